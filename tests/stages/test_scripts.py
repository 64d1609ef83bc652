from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.script import FrameScript
from stages.scripts import SPEC, Scripts, ScriptsConfig, fuse_captions, is_plot
from stages.spec import Fail, Ok, Row


def caption(sentences: list[str], person_index: int | None = None, character_index: int | None = None) -> Row:
    return {
        "film_id": "film",
        "frame_index": 0,
        "target": "keyframe" if person_index is None else "person",
        "person_index": person_index,
        "character_index": character_index,
        "sentences": sentences,
        "captioner": "rules-1",
    }


def keyframe(frame_index: int) -> Row:
    return {"film_id": "film", "frame_index": frame_index, "time_s": frame_index / 25, "shot_index": 1, "jpeg": b""}


def fuse(*captions: Row, max_characters: int = 5, max_sentences: int = 15) -> FrameScript:
    return fuse_captions(list(captions), max_characters, max_sentences)


def test_sentences_are_sorted_into_characters_scene_and_plot() -> None:
    script = fuse(
        caption(["This is a close-up.", "One person is found.", "The picture is dark.", "A new shot begins."]),
        caption(["Person 1 is on the left.", "Person 1 wears blue clothing on the upper body."], 0, 0),
    )
    assert script.characters[0].model_dump() == {
        "identity": "Person 1",
        "character_index": 0,
        "description": ["Person 1 wears blue clothing on the upper body."],
    }
    assert script.scene_elements == ["This is a close-up.", "One person is found.", "The picture is dark."]
    assert script.plot == ["A new shot begins.", "Person 1 is on the left."]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Person 1 is far on the right.", True),
        ("Person 1 is in the centre.", True),
        ("Person 1 is turned far to the left.", True),
        ("Person 1 faces the camera.", True),
        ("The head of Person 1 is tilted to the left.", True),
        ("Person 1 is to the left of Person 2.", True),
        ("Person 1 and Person 2 are turned towards each other.", True),
        ("A new shot begins.", True),
        ("The picture moves a little since the keyframe before.", True),
        ("The picture is still since the keyframe before.", True),
        ("No person is found.", False),
        ("The left half of the scene is mostly brown.", False),
        ("The right side of the picture is brighter than the left side.", False),
        ("The face of Person 1 is brighter on the left.", False),
        ("Person 1 wears black clothing on the lower body.", False),
        ("Person 1 is large in the picture.", False),
        ("No face is found on an unidentified person.", False),
    ],
)
def test_place_direction_and_motion_are_plot(sentence: str, expected: bool) -> None:
    assert is_plot(sentence) is expected


def test_identified_characters_come_first_and_others_are_numbered() -> None:
    script = fuse(
        caption(["Dark."]),
        caption(["a"], 0),
        caption(["b"], 1, 7),
        caption(["c"], 2),
        caption(["d"], 3, 2),
    )
    assert [(c.identity, c.character_index, c.description) for c in script.characters] == [
        ("Person 3", 2, ["d"]),
        ("Person 8", 7, ["b"]),
        ("Unidentified person 1", None, ["a"]),
        ("Unidentified person 2", None, ["c"]),
    ]
    assert fuse(caption(["Dark."]), caption(["a"], 0)).characters[0].identity == "Unidentified person"


def test_a_character_keeps_a_sentence_even_if_all_are_plot() -> None:
    script = fuse(caption(["Dark."]), caption(["Person 1 is on the left.", "Person 1 faces the camera."], 0, 0))
    assert script.characters[0].description == ["Person 1 is on the left."]
    assert script.plot == ["Person 1 faces the camera."]


def test_limits_take_turns() -> None:
    keyframe_caption = caption([f"Scene {i}." for i in range(9)])
    persons = [caption([f"P{p} is on the left.", f"P{p} is tall.", f"P{p} is wide."], p, p) for p in range(6)]
    script = fuse(keyframe_caption, *persons)
    assert len(script.sentences()) == 15
    assert [len(c.description) for c in script.characters] == [2, 2, 2, 2, 2]
    assert script.scene_elements == ["Scene 0.", "Scene 1.", "Scene 2."]
    assert script.plot == ["P0 is on the left.", "P1 is on the left."]
    assert len(fuse(keyframe_caption, *persons, max_characters=2).characters) == 2
    few = fuse(keyframe_caption, *persons, max_sentences=5)
    assert [len(c.description) for c in few.characters] == [1, 1, 1, 1, 1]


SENTENCES = st.lists(
    st.sampled_from(["X is on the left.", "X faces the camera.", "X is tall.", "It is dark.", "It moves."]), max_size=15
)


@given(SENTENCES, st.lists(st.tuples(SENTENCES, st.booleans()), max_size=7), st.integers(5, 15))
def test_every_sentence_is_one_of_the_captions(
    scene: list[str], persons: list[tuple[list[str], bool]], max_sentences: int
) -> None:
    rows = [caption(scene)] + [
        caption([f"{i} {s}" for s in sentences], i, 10 - i if known else None)
        for i, (sentences, known) in enumerate(persons)
    ]
    script = fuse_captions(rows, 5, max_sentences)
    available = [sentence for row in rows for sentence in row["sentences"]]
    told = script.sentences()
    assert len(told) <= max_sentences
    assert len(told) == min(max_sentences, len(told)) and all(told.count(s) <= available.count(s) for s in told)
    assert all(character.description for character in script.characters)
    if sum(1 for sentences, _ in persons if sentences) <= 5:
        assert len(told) == min(max_sentences, len(available))


def test_the_stage_writes_one_script_a_keyframe() -> None:
    stage = Scripts(ScriptsConfig())
    outcomes = list(stage(keyframes=[keyframe(0), keyframe(30)], captions=[caption(["It is dark."])]))
    ok, fail = outcomes
    assert isinstance(ok, Ok)
    table = pa.Table.from_pylist(list(ok.rows), schema=SPEC.schema)
    assert table.to_pylist()[0]["shot_index"] == 1
    assert FrameScript.model_validate_json(table.to_pylist()[0]["script"]).scene_elements == ["It is dark."]
    assert isinstance(fail, Fail)
    assert "film film, keyframe 30" in fail.error and "redo its captions" in fail.error


@pytest.mark.parametrize(
    "changes", [{"max_sentences": 4}, {"max_sentences": 16}, {"max_characters": 6}, {"fuser": "other"}]
)
def test_settings_outside_of_their_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        ScriptsConfig.model_validate(changes)
