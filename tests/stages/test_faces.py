import copy
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from models import weights
from stages.face_choice import FaceChoice
from stages.faces import SPEC, Faces, FacesConfig, match_people
from stages.spec import Fail, Ok, Skip
from tests.stages.test_people import keyframe, keyframe_of
from tests.tiny_checkpoints import save_farl, save_insightface


@pytest.fixture(scope="module")
def stage() -> Faces:
    return Faces(FacesConfig())


def with_settings(stage: Faces, **settings: float) -> Faces:
    """The same loaded models under other settings; loading takes seconds."""
    other = copy.copy(stage)
    other.config = FacesConfig(**settings)
    return other


def person(index: int, *box: float, frame_index: int = 0) -> dict:
    return {"frame_index": frame_index, "person_index": index, **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))}


def test_a_face_is_matched_aligned_and_embedded_twice(stage: Faces) -> None:
    frames = [keyframe("carphone_pristine.mp4", 0), keyframe("bikes.mp4", 25)]
    people = [person(3, 20, 10, 176, 144, frame_index=0), person(0, 0, 0, 640, 272, frame_index=25)]
    found, empty = stage(keyframes=frames, people=people)
    assert isinstance(found, Ok) and empty == Skip("25", "no_face")
    (row,) = pa.Table.from_pylist(list(found.rows), schema=SPEC.schema).to_pylist()
    assert (row["face_index"], row["person_index"]) == (0, 3)
    assert len(row["landmarks"]) == 10 and len(row["embedding"]) == 384 and len(row["identity"]) == 128
    assert np.linalg.norm(row["embedding"]) == pytest.approx(1, abs=1e-4)
    assert row["sharpness"] > 0 and row["x0"] < row["x1"] <= 176
    assert Image.open(io.BytesIO(row["jpeg"])).size == (150, 150)


def test_a_keyframe_without_people_rows_still_gives_its_faces(stage: Faces) -> None:
    (found,) = stage(keyframes=[keyframe("carphone_pristine.mp4", 0)], people=[])
    assert [row["person_index"] for row in found.rows] == [None]


def test_small_faces_are_left_out(stage: Faces) -> None:
    picky = with_settings(stage, min_face_px=100)
    (outcome,) = picky(keyframes=[keyframe("carphone_pristine.mp4", 0)], people=[])
    assert outcome == Skip("0", "no_face")


def test_at_most_max_faces(stage: Faces) -> None:
    man = np.asarray(Image.open(io.BytesIO(keyframe("carphone_pristine.mp4", 0)["jpeg"])))
    (outcome,) = with_settings(stage, max_faces=2)(keyframes=[keyframe_of(np.tile(man, (2, 2, 1)))], people=[])
    rows = list(outcome.rows)
    assert len(rows) == 2 and rows[0]["score"] >= rows[1]["score"]


def test_a_broken_jpeg_fails_and_says_what_to_do(stage: Faces) -> None:
    (outcome,) = stage(keyframes=[{"film_id": "film", "frame_index": 7, "jpeg": b"\xff\xd8"}], people=[])
    assert isinstance(outcome, Fail) and "redo the keyframes stage" in outcome.error


def test_each_person_gets_at_most_one_face_and_the_best_fit_in_all() -> None:
    people = [person(0, 0, 0, 100, 200), person(1, 50, 0, 150, 200)]
    faces = np.array([[85.0, 5, 115, 45], [60, 10, 90, 45], [300, 5, 330, 40]])
    assert match_people(faces, people) == [1, 0, None]
    assert match_people(faces[:2], people[:1]) == [None, 0]
    assert match_people(faces, []) == [None, None, None]


def test_a_face_mostly_outside_a_box_is_nobodys() -> None:
    assert match_people(np.array([[90.0, 0, 130, 40]]), [person(0, 0, 0, 100, 200)]) == [None]


def test_config_names_its_weights() -> None:
    assert set(FacesConfig().weights()) <= set(weights.TABLE)


def test_absent_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError, match="weights pull centerface"):
        Faces(FacesConfig(), tmp_path)


def test_the_papers_models_take_the_places_of_the_small_ones(tmp_path: Path) -> None:
    save_farl(tmp_path / "farl.pth")
    choice = FaceChoice(
        detector="insightface", conditioning="farl", identity="arcface", farl_weights=str(tmp_path / "farl.pth"),
        insightface_weights=str(save_insightface(tmp_path / "buffalo")),
    )  # fmt: skip
    config = FacesConfig(models=choice, min_face_px=4)
    assert set(config.weights()) == {str(tmp_path / "farl.pth"), str(tmp_path / "buffalo")}
    image = np.zeros((640, 640, 3), np.uint8)
    image[160:168, 320:328] = 255
    (found,) = Faces(config)(keyframes=[keyframe_of(image)], people=[])
    (row,) = pa.Table.from_pylist(list(found.rows), schema=SPEC.schema).to_pylist()
    assert len(row["embedding"]) == 24 and len(row["identity"]) == 512


def test_where_weights_lie_is_no_part_of_the_recipe() -> None:
    here, there = (FacesConfig(models=FaceChoice(conditioning="farl", farl_weights=place)) for place in ("/a", "/b"))
    assert here.recipe() == there.recipe() != FacesConfig().recipe()
    assert set(FacesConfig().recipe()) == {
        "detector", "min_score", "min_face_px", "max_faces", "conditioning", "identity", "jpeg_quality",
    }  # fmt: skip
