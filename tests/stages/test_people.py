import io
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError

from models import weights
from stages.people import SPEC, People, PeopleConfig, body_of_face
from stages.spec import Fail, Ok, Skip
from tests.tiny_checkpoints import save_grounding_dino, save_sam2


@pytest.fixture(scope="module")
def stage() -> People:
    return People(PeopleConfig())


def keyframe(name: str, index: int) -> dict:
    with av.open(str(weights.folder("demo_films") / name)) as film:
        frame = next(f for i, f in enumerate(film.decode(video=0)) if i == index)
    return keyframe_of(frame.to_ndarray(format="rgb24"), index)


def keyframe_of(image: np.ndarray, index: int = 0) -> dict:
    _, jpeg = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    return {"film_id": "film", "frame_index": index, "jpeg": jpeg.tobytes()}


def test_each_keyframe_gets_one_outcome_and_rows_fit_the_schema(stage: People) -> None:
    found, empty = stage(keyframes=[keyframe("bikes.mp4", 125), keyframe("bikes.mp4", 25)])
    assert isinstance(found, Ok) and found.item == "125"
    assert empty == Skip("25", "no_person")
    table = pa.Table.from_pylist(list(found.rows), schema=SPEC.schema)
    assert table["person_index"].to_pylist() == [0] and table["source"].to_pylist() == ["detector"]
    row = table.to_pylist()[0]
    mask = Image.open(io.BytesIO(row["mask_png"]))
    assert mask.mode == "L"
    width = np.ceil(row["x1"]) - np.floor(row["x0"])
    assert mask.size == (width, np.ceil(row["y1"]) - np.floor(row["y0"]))
    assert 0.15 < np.asarray(mask).mean() / 255 < 0.8


def test_a_black_keyframe_has_no_person(stage: People) -> None:
    assert list(stage(keyframes=[keyframe_of(np.zeros((90, 160, 3), np.uint8))])) == [Skip("0", "no_person")]


@pytest.mark.parametrize("jpeg", [b"", b"no picture", None])
def test_a_broken_jpeg_fails_and_says_what_to_do(stage: People, jpeg: bytes | None) -> None:
    (outcome,) = stage(keyframes=[{"film_id": "film", "frame_index": 7, "jpeg": jpeg}])
    assert isinstance(outcome, Fail) and not outcome.retryable
    assert "keyframe 7" in outcome.error and "redo the keyframes stage" in outcome.error


def test_a_face_that_no_person_box_holds_adds_a_person() -> None:
    blind = People(PeopleConfig(min_score=1.0))
    (outcome,) = blind(keyframes=[keyframe("carphone_pristine.mp4", 0)])
    (row,) = outcome.rows
    assert row["source"] == "face" and row["x0"] < 60 and row["y1"] > 130


def test_a_face_inside_a_person_box_adds_nobody(stage: People) -> None:
    (outcome,) = stage(keyframes=[keyframe("carphone_pristine.mp4", 0)])
    assert [row["source"] for row in outcome.rows] == ["detector"]


def test_at_most_max_people_highest_score_first() -> None:
    man = cv2.resize(np.asarray(Image.open(io.BytesIO(keyframe("carphone_pristine.mp4", 0)["jpeg"]))), (176, 176))
    crowd = np.tile(man, (2, 2, 1))
    all_four = People(PeopleConfig(min_score=0.2)).find(crowd)
    two = People(PeopleConfig(min_score=0.2, max_people=2)).find(crowd)
    assert len(all_four[1]) >= 3 and len(two[1]) == 2
    assert (np.diff(all_four[1]) <= 0).all()
    np.testing.assert_array_equal(two[0], all_four[0][:2])


def test_bodies_hold_their_faces_and_stay_in_the_picture() -> None:
    faces = np.array([[10.0, 10, 30, 40], [90, 50, 99, 59]])
    bodies = body_of_face(faces, 100, 60)
    assert (bodies[:, :2] <= faces[:, :2]).all() and (bodies[:, 2:] >= faces[:, 2:]).all()
    assert (bodies[:, :2] >= 0).all() and (bodies[:, 2:] <= [100, 60]).all()
    assert body_of_face(np.zeros((0, 4)), 100, 60).shape == (0, 4)


def test_config_names_its_weights_and_refuses_nonsense() -> None:
    assert set(PeopleConfig().weights()) <= set(weights.TABLE)
    with pytest.raises(ValidationError, match="max_people"):
        PeopleConfig(max_people=0)
    with pytest.raises(ValidationError, match="ssdlite"):
        PeopleConfig(detector="yolo")


def test_absent_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError, match="weights pull ssdlite_person"):
        People(PeopleConfig(), tmp_path)


def test_grounding_dino_and_sam2_take_the_places_of_the_small_models(tmp_path: Path) -> None:
    config = PeopleConfig(
        detector="grounding_dino", detector_weights=str(save_grounding_dino(tmp_path / "dino")),
        masks="sam2", mask_weights=str(save_sam2(tmp_path / "sam")), faces="none", min_score=0.0,
    )  # fmt: skip
    assert set(config.weights()) == {str(tmp_path / "dino"), str(tmp_path / "sam")}
    (outcome,) = People(config)(keyframes=[keyframe("bikes.mp4", 125)])
    table = pa.Table.from_pylist(list(outcome.rows), schema=SPEC.schema)
    assert 1 <= len(table) <= 5 and set(table["source"].to_pylist()) == {"detector"}
    for row in table.to_pylist():
        mask = Image.open(io.BytesIO(row["mask_png"]))
        assert mask.size == (np.ceil(row["x1"]) - np.floor(row["x0"]), np.ceil(row["y1"]) - np.floor(row["y0"]))


def test_without_masks_there_are_none(stage: People) -> None:
    (outcome,) = People(PeopleConfig(masks="none"))(keyframes=[keyframe("bikes.mp4", 125)])
    assert [row["mask_png"] for row in outcome.rows] == [None]


def test_where_weights_lie_is_no_part_of_the_recipe() -> None:
    here, there = (PeopleConfig(detector="grounding_dino", detector_weights=place) for place in ("/a", "/b"))
    assert here.recipe() == there.recipe() != PeopleConfig().recipe()
