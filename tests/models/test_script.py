import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.script import (
    Character,
    FrameScript,
    Piece,
    ScriptError,
    Story,
    load_story,
    mirror_sentence,
    name_character,
    parse_story,
    story_schema,
)

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)
SCRIPT = FrameScript(
    characters=[
        Character(identity="Person 1", character_index=0, description=["Person 1 is on the left.", "Black coat."]),
        Character(identity="Person 2", character_index=1, description=["Person 2 is to the right of Person 1."]),
    ],
    scene_elements=["The picture is dark."],
    plot=["A new shot begins."],
)


def story_text(**changes) -> str:
    story = {
        "title": "Two",
        "characters": [{"identity": "Ada", "description": ["Ada wears blue."]}, {"identity": "Bob"}],
        "frames": [
            {"characters": [{"identity": "Ada"}], "plot": ["Ada waits."], "shot": 0},
            {"characters": [{"identity": "Bob", "description": ["Bob is on the left."]}], "shot": 1},
        ],
    }
    return json.dumps(story | changes)


def frames(*values: dict) -> str:
    return story_text(frames=list(values))


def test_sentences_and_layout_agree() -> None:
    pieces = SCRIPT.layout()
    assert [piece.text for piece in pieces if piece.kind == "sentence"] == SCRIPT.sentences()
    assert pieces[:4] == [
        Piece("identifier", "Characters:"),
        Piece("identifier", "Person 1:", 0),
        Piece("face", "", 0),
        Piece("sentence", "Person 1 is on the left.", 0),
    ]
    assert [piece.text for piece in pieces if piece.kind == "identifier"] == [
        "Characters:",
        "Person 1:",
        "Person 2:",
        "Scene Elements:",
        "Plot:",
    ]


def test_mirroring_swaps_sides_and_nothing_else() -> None:
    mirrored = SCRIPT.mirrored()
    assert mirrored.characters[0].description == ["Person 1 is on the right.", "Black coat."]
    assert mirrored.characters[1].description == ["Person 2 is to the left of Person 1."]
    assert mirrored.scene_elements == SCRIPT.scene_elements
    assert mirrored.mirrored() == SCRIPT


@pytest.mark.parametrize(
    ("sentence", "mirrored"),
    [
        ("Left of the right-hand door.", "Right of the left-hand door."),
        ("The leftmost one looks rightwards.", "The rightmost one looks leftwards."),
        ("A bright copyright note, lefty.", "A bright copyright note, lefty."),
    ],
)
def test_only_whole_words_are_mirrored(sentence: str, mirrored: str) -> None:
    assert mirror_sentence(sentence) == mirrored


@given(st.lists(st.sampled_from(["left", "Right", "LEFT", "right-hand", "leftmost", "bright", " ", "-", ".", "x"])))
def test_mirroring_is_its_own_inverse(parts: list[str]) -> None:
    sentence = "".join(parts)
    assert mirror_sentence(mirror_sentence(sentence)) == sentence


def test_characters_are_counted_from_one() -> None:
    assert name_character(0) == "Person 1"


@pytest.mark.parametrize(
    "fields",
    [
        {"characters": [{"identity": str(i)} for i in range(6)]},
        {"plot": ["x"] * 16},
        {"characters": [{"identity": "A"}, {"identity": "A"}]},
        {"mood": "sad"},
        {"plot": [" "]},
    ],
)
def test_scripts_keep_their_limits(fields: dict) -> None:
    with pytest.raises(ValidationError):
        FrameScript.model_validate(fields)


def test_scripts_survive_json() -> None:
    assert FrameScript.model_validate_json(SCRIPT.model_dump_json()) == SCRIPT


def test_a_story_is_completed_on_loading(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "ada.png").write_bytes(PNG)
    characters = [
        {"identity": "Ada", "description": ["Ada wears blue."], "face": "faces/ada.png"},
        {"identity": "Bob", "film": "film", "character_index": 1},
    ]
    path = tmp_path / "story.json"
    path.write_bytes(b"\xef\xbb\xbf" + story_text(characters=characters).encode())
    story = load_story(path)
    assert story.frames[0].characters[0].description == ["Ada wears blue."]
    assert story.frames[1].characters[0].description == ["Bob is on the left."]
    assert story.characters[0].face == str(tmp_path / "faces" / "ada.png")
    assert Story.model_validate_json(story.model_dump_json()) == story


def test_a_frame_without_shot_continues_the_shot_before() -> None:
    shots = [{"plot": ["x"], "shot": shot} for shot in (None, 2, None, 3)]
    assert parse_story(frames(*shots)).shot_indices() == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"frames":\n [,]}', ["line 2, column 3", "not valid JSON"]),
        ('{"frames": [], "frames": []}', ["'frames'", "twice", "remove one"]),
        ("[" * 100_000, ["cannot be read as JSON"]),
        ("[1]", ["expected one JSON object", "[1]"]),
        ("{}", ["frames", "missing", "add"]),
        (frames(), ["frames", "empty", "add"]),
        (story_text(author="me"), ["unknown field 'author'", "title, characters, frames"]),
        (frames({"plt": ["x"]}), ["frame 1 (frames[0].plt)", "unknown field 'plt'", "did you mean 'plot'"]),
        (
            frames({"plot": ["x"]}, {"characters": [{"identity": str(i)} for i in range(6)]}),
            ["frame 2 (frames[1].characters)", "6 characters", "at most 5", "another frame"],
        ),
        (
            frames({"characters": [{"identity": "Eve"}], "plot": ["x"]}),
            ["frame 1", "'Eve'", "'Ada', 'Bob'", "correct the name"],
        ),
        (frames({"characters": [{"identity": "Ada"}] * 2}), ["frame 1", "'Ada' stands twice", "join"]),
        (frames({"characters": [{"identity": "Ada", "hat": 1}]}), ["'hat'", "identity, character_index, description"]),
        (frames({"plot": ["x", "  "]}), ["frame 1 (frames[0].plot[1])", "blank", "remove"]),
        (frames({"plot": ["x" * 1001]}), ["frames[0].plot[0]", "1001 letters", "1000", "shorten"]),
        (frames({"plot": ["x"] * 16}), ["frame 1 (frames[0])", "16 sentences", "at most 15", "shorten"]),
        (frames({"plot": ["x"] * 15, "characters": [{"identity": "Ada"}]}), ["frame 1", "16 sentences", "shorten"]),
        (frames({}), ["frame 1 (frames[0])", "no sentence", "describe"]),
        (frames({"plot": "x"}), ["frames[0].plot", "valid list", '"x"']),
        (frames({"plot": ["x"], "shot": "1"}), ["frames[0].shot", "valid integer", '"1"']),
        (frames({"plot": ["x"], "shot": -1}), ["frames[0].shot", "greater than or equal to 0", "-1"]),
        (
            frames({"plot": ["x"], "shot": 2}, {"plot": ["x"], "shot": 1}),
            ["frame 2 (frames[1].shot)", "shot 1 comes after shot 2", "in the order"],
        ),
        (story_text(characters=[{"identity": "Ada"}] * 2), ["'Ada' stands twice", "name of its own"]),
        (story_text(characters=[{"identity": " "}]), ["characters[0].identity", "blank"]),
        (story_text(characters=[{"identity": str(i)} for i in range(1001)]), ["characters", "1001", "1000", "shorten"]),
        (story_text(characters=[{"identity": "Ada", "film": "f"}]), ["characters[0]", "together", "both or neither"]),
        (
            story_text(characters=[{"identity": "Ada", "film": "f", "character_index": 0, "face": "a.png"}]),
            ["characters[0]", "face and film", "one of them"],
        ),
        (frames(*[{"mood": 1}] * 9), ["frame 5", "and 4 more problems"]),
    ],
)
def test_a_wrong_story_is_told_where_and_what_to_do(text: str, parts: list[str]) -> None:
    with pytest.raises(ScriptError) as caught:
        parse_story(text, source="tale.json")
    message = str(caught.value)
    assert message.startswith("tale.json: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("face", "parts"),
    [
        ("ada.png", ["characters[0].face (Ada)", "ada.png", "cannot be read", "correct the path"]),
        ("story.json", ["characters[0].face (Ada)", "neither JPEG nor PNG"]),
        ("a\0b", ["characters[0].face (Ada)", "cannot be read"]),
    ],
)
def test_an_unusable_face_picture_is_named(tmp_path: Path, face: str, parts: list[str]) -> None:
    path = tmp_path / "story.json"
    path.write_text(story_text(characters=[{"identity": "Ada", "face": face}, {"identity": "Bob"}]))
    with pytest.raises(ScriptError) as caught:
        load_story(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(("content", "part"), [(None, "cannot be read"), (b"\xff{}", "not UTF-8")])
def test_an_unreadable_story_is_named(tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "story.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ScriptError, match=part) as caught:
        load_story(path)
    assert str(path) in str(caught.value)


def test_the_published_schema_is_the_models() -> None:
    published = json.loads((ROOT / "docs" / "story.schema.json").read_text())
    assert published == story_schema(), "run: python -m models.script > docs/story.schema.json"


def test_the_generator_prints_the_schema() -> None:
    command = [sys.executable, "-m", "models.script"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs" / "story.schema.json").read_text()


def test_the_example_is_a_story() -> None:
    story = load_story(ROOT / "examples" / "story.json")
    assert 8 <= len(story.frames) <= 10
    assert len(set(story.shot_indices())) in (3, 4)
    assert story.characters[0].film == "carphone_pristine.mp4"
