from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from stages.captions import SPEC, Captions, CaptionsConfig, choose_characters
from stages.spec import Fail, Ok, Row

HEIGHT, WIDTH = 120, 160


def jpeg(color: tuple[int, int, int] = (60, 140, 60)) -> bytes:
    image = np.full((HEIGHT, WIDTH, 3), color[::-1], np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def keyframe(frame_index: int, **changes: Any) -> Row:
    row = {"film_id": "film", "frame_index": frame_index, "jpeg": jpeg(), "motion": None}
    return row | changes


def person(frame_index: int, person_index: int, x0: float, **changes: Any) -> Row:
    mask = np.full((91, 41), 255, np.uint8)
    row = {
        "film_id": "film",
        "frame_index": frame_index,
        "person_index": person_index,
        "x0": x0 + 0.5,
        "y0": 20.5,
        "x1": x0 + 40.5,
        "y1": 110.5,
        "mask_png": cv2.imencode(".png", mask)[1].tobytes(),
    }
    return row | changes


def face(frame_index: int, face_index: int, person_index: int | None, x: float) -> Row:
    return {
        "film_id": "film",
        "frame_index": frame_index,
        "face_index": face_index,
        "person_index": person_index,
        "x0": x + 8,
        "y0": 22,
        "x1": x + 32,
        "y1": 52,
        "score": 0.9,
        "landmarks": [x + 14.0, 33.0, x + 26.0, 33.0, x + 20.0, 39.0, x + 15.0, 45.0, x + 25.0, 45.0],
    }


def identity(frame_index: int, face_index: int, character_index: int | None, distance: float | None = 0.2) -> Row:
    return {
        "film_id": "film",
        "frame_index": frame_index,
        "face_index": face_index,
        "character_index": character_index,
        "distance": distance,
    }


def run(**inputs: list[Row]) -> list[Ok | Fail]:
    config = inputs.pop("config", CaptionsConfig())
    roles = {"keyframes": [keyframe(0)], "people": [], "faces": [], "identities": []}
    return list(Captions(config)(**(roles | inputs)))


def test_each_keyframe_has_one_outcome_with_or_without_people() -> None:
    outcomes = run(
        keyframes=[keyframe(0), keyframe(30, motion=0.0), keyframe(60)],
        people=[person(30, 0, 10), person(30, 1, 100)],
        faces=[face(30, 0, 0, 10), face(30, 1, None, 60)],
        identities=[identity(30, 0, 2), identity(30, 1, None, None)],
    )
    assert [outcome.item for outcome in outcomes] == ["0", "30", "60"]
    assert all(isinstance(outcome, Ok) for outcome in outcomes)
    rows = [row for outcome in outcomes for row in outcome.rows]
    table = pa.Table.from_pylist(rows, schema=SPEC.schema)
    assert table.column("target").to_pylist() == ["keyframe", "keyframe", "person", "person", "keyframe"]
    assert table.column("person_index").to_pylist() == [None, None, 0, 1, None]
    assert table.column("character_index").to_pylist() == [None, None, 2, None, None]
    assert set(table.column("captioner").to_pylist()) == {"rules-1"}
    assert "No person is found." in rows[0]["sentences"]
    assert "Three persons are found." in rows[1]["sentences"]
    assert "The picture is still since the keyframe before." in rows[1]["sentences"]
    assert "Person 3 faces the camera." in rows[2]["sentences"]
    assert "No face is found on an unidentified person." in rows[3]["sentences"]


def test_captions_are_the_same_each_time() -> None:
    inputs = {"people": [person(0, 0, 10)], "faces": [face(0, 0, 0, 10)], "identities": [identity(0, 0, 0)]}
    assert run(**inputs) == run(**inputs)


def test_settings_bound_the_sentences() -> None:
    config = CaptionsConfig(max_sentences=2, max_person_sentences=1)
    (outcome,) = run(config=config, people=[person(0, 0, 10)])
    assert [len(row["sentences"]) for row in outcome.rows] == [2, 1]


@pytest.mark.parametrize("field", ["max_sentences", "max_person_sentences"])
@pytest.mark.parametrize("value", [0, 16])
def test_settings_outside_of_their_range_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValidationError, match=field):
        CaptionsConfig.model_validate({field: value})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"jpeg": b"not a picture"}, ["keyframe 7", "picture (13 bytes)", "redo"]),
        ({"jpeg": b""}, ["keyframe 7", "picture (0 bytes)"]),
    ],
)
def test_a_broken_picture_fails_alone(changes: dict[str, bytes], parts: list[str]) -> None:
    broken, good = run(keyframes=[keyframe(7, **changes), keyframe(8)])
    assert isinstance(broken, Fail)
    assert isinstance(good, Ok)
    for part in ["film film", *parts]:
        assert part in broken.error


@pytest.mark.parametrize(
    ("mask_png", "part"),
    [
        (b"junk", "mask of person 0 (4 bytes) cannot be decoded"),
        (cv2.imencode(".png", np.zeros((5, 5), np.uint8))[1].tobytes(), "the mask is 5x5 pixels"),
    ],
)
def test_a_broken_mask_fails_its_keyframe(mask_png: bytes, part: str) -> None:
    (outcome,) = run(people=[person(0, 0, 10, mask_png=mask_png)])
    assert isinstance(outcome, Fail)
    assert part in outcome.error


def test_a_character_is_one_person_of_a_keyframe() -> None:
    faces = [face(0, 0, 0, 10), face(0, 1, 1, 60), face(0, 2, None, 90), face(0, 3, 3, 120)]
    identities = [identity(0, 0, 4, 0.4), identity(0, 1, 4, 0.1), identity(0, 2, 5, 0.1), identity(0, 3, None, None)]
    assert choose_characters(faces, identities) == {1: 4}
