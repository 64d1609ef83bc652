"""Stories to tokens: the modes, the sources of faces, and what is refused."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from models import weights
from models.autoregressive import AutoregressiveConfig, AutoregressiveModel, save_autoregressive
from models.language_model import build_language_model
from models.script import Character, FrameScript
from models.token_table import write_token_table
from stages.dream import SCHEMA, SPEC, Dream, DreamConfig
from stages.errors import MissingInputError, StoryError
from stages.spec import Inputs, no_progress
from tests.stages.test_train_renderer import write_autoencoder

pytestmark = pytest.mark.usefixtures("one_thread")

TRUNK = {
    "vocab_size": 8, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
STORY = {
    "characters": [{"identity": "Ann", "description": ["Ann wears red."]}],
    "frames": [
        {"characters": [{"identity": "Ann"}], "plot": ["Ann waits."]},
        {"scene_elements": ["It is dark."], "shot": 3},
        {"plot": ["A new shot begins."]},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({"?": 0, "Plot:": 1}, unk_token="?"))
    config = AutoregressiveConfig(TRUNK, tokens_per_frame=2, token_dim=4, text_width=384, face_width=384, components=2)
    model = AutoregressiveModel(config, build_language_model(TRUNK), tokenizer)
    torch.nn.init.normal_(model.head.weight)
    save_autoregressive(model, folder)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A film whose character 0 has three faces, of which the second lies between the others."""
    folder = tmp_path_factory.mktemp("tokens")
    script = FrameScript(characters=[Character(identity="Person 1", character_index=0)]).model_dump_json()
    rows = [
        {
            "film_id": "bikes", "frame_index": index, "time_s": 0.0, "shot_index": 0, "split": "train",
            "tokens": np.full(8, index), "mirrored_tokens": np.full(8, index), "script": script,
            "mirrored_script": script, "sentence_embeddings": [], "mirrored_sentence_embeddings": [],
            "face_character": [0], "face_embeddings": np.full(384, (0, 5, 6)[index], np.float32),
        }
        for index in range(3)
    ]  # fmt: skip
    write_token_table([rows], folder, {"tokens_per_frame": 2, "token_dim": 4, "text_width": 384, "face_width": 384})
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def face_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frame of the demo clip that shows a man's face."""
    reader = cv2.VideoCapture(str(weights.folder("demo_films") / "carphone_pristine.mp4"))
    _, frame = reader.read()
    path = tmp_path_factory.mktemp("picture") / "a face.png"
    cv2.imwrite(str(path), frame)
    return path


def write_story(folder: Path, **changes: Any) -> Path:
    path = folder / "story.json"
    path.write_text(json.dumps(STORY | changes))
    return path


def dream(folder: Path, inputs: Inputs, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    summary = Dream(DreamConfig(**settings))({"autoencoder": []} | inputs, folder, folder, no_progress)
    table = pq.read_table(folder / "dream.parquet")
    assert table.schema.equals(SCHEMA)
    return summary, table.to_pylist()


def with_character(folder: Path, **character: Any) -> Path:
    return write_story(folder, characters=[STORY["characters"][0] | character])


def test_zero_shot(model: list[Path], tmp_path: Path) -> None:
    summary, rows = dream(tmp_path, {"story": [write_story(tmp_path)], "autoregressive": model})
    assert summary == {"frames": 3, "mode": "zero-shot", "references": 0, "history": 0}
    assert [(row["frame_index"], row["shot_index"]) for row in rows] == [(0, 0), (1, 3), (2, 3)]
    scripts = [FrameScript.model_validate_json(row["script"]) for row in rows]
    assert scripts[0].sentences() == ["Ann wears red.", "Ann waits."]
    assert [len(row["sentence_embeddings"]) // 384 for row in rows] == [2, 1, 1]
    assert all(len(row["tokens"]) == 8 and row["face_embeddings"] == [] for row in rows)


def test_same_seed_same_bytes_other_seed_other_tokens(model: list[Path], tmp_path: Path) -> None:
    inputs = {"story": [write_story(tmp_path)], "autoregressive": model}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        dream(tmp_path / name, inputs, seed=seed)
    a, b, c = ((tmp_path / name / "dream.parquet").read_bytes() for name in "abc")
    assert a == b != c


def test_stories_dreamed_together_are_those_dreamed_alone(
    model: list[Path], tokens: list[Path], tmp_path: Path
) -> None:
    """Of other lengths and with other faces; one that cannot be used fails alone."""
    stories = {
        "a": {}, "bad": {"characters": [STORY["characters"][0] | {"film": "none", "character_index": 0}]},
        "b": {"frames": [{"plot": [f"Part {n}."]} for n in range(5)]},
        "c": {"characters": [STORY["characters"][0] | {"film": "bikes", "character_index": 0}]},
    }  # fmt: skip
    jobs = []
    for name, changes in stories.items():
        for folder in (tmp_path / name, tmp_path / f"{name} alone"):
            folder.mkdir()
        story = write_story(tmp_path / name, **changes)
        jobs.append(({"story": [story], "autoregressive": model, "autoencoder": [], "tokens": tokens}, story.parent))
    came = dict(zip(stories, Dream(DreamConfig()).together(jobs, no_progress), strict=True))
    assert isinstance(came["bad"], StoryError) and not (tmp_path / "bad" / "dream.parquet").exists()
    for (inputs, out), name in zip(jobs, stories, strict=True):
        if name != "bad":
            summary, alone = dream(tmp_path / f"{name} alone", inputs)
            assert came[name] == summary
            together = pq.read_table(out / "dream.parquet").to_pylist()
            for one, other in zip(together, alone, strict=True):
                np.testing.assert_allclose(one.pop("tokens"), other.pop("tokens"), atol=1e-4)
                assert one == other


def test_story_longer_than_the_window(model: list[Path], tmp_path: Path) -> None:
    story = write_story(tmp_path, frames=[{"plot": [f"Part {n}."]} for n in range(9)])
    settings = {"window_frames": 4, "overlap_frames": 1}
    summary, rows = dream(tmp_path, {"story": [story], "autoregressive": model}, **settings)
    assert summary["frames"] == len(rows) == 9
    assert np.isfinite([row["tokens"] for row in rows]).all()


def test_a_long_story_in_a_window_that_slides(model: list[Path], tokens: Path, tmp_path: Path) -> None:
    """As with fresh windows until the first one is full; a film to go on from keeps its place in it."""
    story = write_story(tmp_path, frames=[{"plot": [f"Part {n}."]} for n in range(9)])
    inputs = {"story": [story], "autoregressive": model, "tokens": tokens}
    settings = {"window_frames": 6, "overlap_frames": 2, "continue_film": "bikes"}
    _, restarted = dream(tmp_path / "restart", inputs, **settings)
    summary, slid = dream(tmp_path / "slide", inputs, **settings, window="slide", sink_frames=2)
    assert (summary["frames"], summary["mode"], summary["history"]) == (9, "continue", 2)
    same = [np.allclose(a["tokens"], b["tokens"], atol=1e-5) for a, b in zip(restarted, slid, strict=True)]
    assert same[:4] == [True] * 4 and not all(same)


def test_guidance_leads_where_there_is_a_script(model: list[Path], tmp_path: Path) -> None:
    inputs = {"story": [write_story(tmp_path)], "autoregressive": model}
    for name, settings in (("plain", {}), ("none", {"guidance": 0.0}), ("guided", {"guidance": 2.0})):
        dream(tmp_path / name, inputs, **settings)
    made = [
        pq.read_table(tmp_path / name / "dream.parquet")["tokens"].to_pylist() for name in ("plain", "none", "guided")
    ]
    assert made[0] == made[1]
    assert np.isfinite(made[2]).all() and not np.isclose(made[0], made[2]).all(-1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_frames": 8, "overlap_frames": 8}, "overlap_frames 8: expected at most window_frames - 1 = 7"),
        (
            {"window": "slide", "window_frames": 20, "sink_frames": 19},
            "sink_frames 19: expected at most window_frames - 2 = 18",
        ),
        ({"window": "jump"}, "Input should be 'restart' or 'slide'"),
        ({"guidance": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_fit_the_window(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DreamConfig(**settings)


def test_a_characters_face_comes_from_a_picture(model: list[Path], face_picture: Path, tmp_path: Path) -> None:
    _, plain = dream(tmp_path / "plain", {"story": [write_story(tmp_path)], "autoregressive": model})
    story = with_character(tmp_path, face=str(face_picture))
    _, rows = dream(tmp_path / "face", {"story": [face_picture, story], "autoregressive": model})
    face = np.asarray(rows[0]["face_embeddings"])
    assert np.linalg.norm(face) == pytest.approx(1, abs=1e-5)
    assert [len(row["face_embeddings"]) for row in rows] == [384, 0, 0]
    assert not np.allclose(rows[0]["tokens"], plain[0]["tokens"])


def test_a_characters_face_comes_from_a_film(model: list[Path], tokens: Path, tmp_path: Path) -> None:
    story = with_character(tmp_path, film="bikes", character_index=0)
    _, rows = dream(tmp_path, {"story": [story], "autoregressive": model, "tokens": tokens})
    assert rows[0]["face_embeddings"] == [5.0] * 384


def test_going_on_from_a_film(model: list[Path], tokens: Path, tmp_path: Path) -> None:
    inputs = {"story": [write_story(tmp_path)], "autoregressive": model, "tokens": tokens}
    _, plain = dream(tmp_path / "plain", inputs)
    summary, rows = dream(tmp_path / "on", inputs, continue_film="bikes", overlap_frames=2)
    assert (summary["mode"], summary["history"]) == ("continue", 2)
    assert not np.allclose(rows[0]["tokens"], plain[0]["tokens"])


def test_few_shot_from_pictures(model: list[Path], face_picture: Path, tmp_path: Path) -> None:
    inputs = {"story": [write_story(tmp_path)], "autoregressive": model, "references": [face_picture] * 3}
    inputs["autoencoder"] = write_autoencoder(tmp_path / "autoencoder", token_dim=4)
    summary, rows = dream(tmp_path / "few", inputs, max_references=2)
    assert (summary["mode"], summary["references"]) == ("few-shot", 2)
    _, plain = dream(tmp_path / "zero", inputs, max_references=0)
    assert not np.allclose(rows[0]["tokens"], plain[0]["tokens"])
    _, slid = dream(tmp_path / "slide", inputs, max_references=2, window="slide", window_frames=4, overlap_frames=0)
    np.testing.assert_allclose([row["tokens"] for row in slid], [row["tokens"] for row in rows], atol=1e-5)


def test_a_picture_without_a_face_is_named(model: list[Path], tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "wall.png"), np.full((200, 200, 3), 90, np.uint8))
    with pytest.raises(StoryError, match="wall.png: no face found"):
        dream(tmp_path, {"story": [with_character(tmp_path, face="wall.png")], "autoregressive": model})


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xd8\xff", "cannot be read as a picture"), (None, "cannot be read .*: correct the path")],
)
def test_a_reference_that_is_no_picture(model: list[Path], tmp_path: Path, content: bytes | None, message: str) -> None:
    from stages.dream import _read_picture

    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoryError, match=f"x.jpg: {message}"):
        _read_picture(path)


def test_an_unknown_film_or_character(model: list[Path], tokens: Path, tmp_path: Path) -> None:
    inputs = {"autoregressive": model, "tokens": tokens}
    story = with_character(tmp_path, film="cars", character_index=0)
    with pytest.raises(StoryError, match="'Ann' names film 'cars', which was not ingested: expected one of bikes"):
        dream(tmp_path, inputs | {"story": [story]})
    story = with_character(tmp_path, film="bikes", character_index=4)
    with pytest.raises(StoryError, match=r"film 'bikes' has no face of character 4: expected one of \[0\]"):
        dream(tmp_path, inputs | {"story": [story]})


def test_going_on_without_any_tokens(model: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="continue_film names film 'bikes', but no film was tokenized"):
        dream(tmp_path, {"story": [write_story(tmp_path)], "autoregressive": model}, continue_film="bikes")


def test_no_trained_model(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no trained story model: run `moviedreamer train` first"):
        dream(tmp_path, {"story": [write_story(tmp_path)], "autoregressive": []})


def test_a_model_of_another_text_encoder(model: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoregressiveConfig(TRUNK, tokens_per_frame=2, token_dim=4, text_width=7, face_width=384)
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    save_autoregressive(AutoregressiveModel(config, build_language_model(TRUNK), tokenizer), tmp_path)
    other = [tmp_path / "model.safetensors"]
    with pytest.raises(MissingInputError, match="sentence embeddings of 384 numbers do not fit .* which takes 7"):
        dream(tmp_path, {"story": [write_story(tmp_path)], "autoregressive": other})


def test_a_story_that_is_none(model: list[Path], tmp_path: Path) -> None:
    with pytest.raises(StoryError, match="unknown field 'tittle'"):
        dream(tmp_path, {"story": [write_story(tmp_path, tittle="x")], "autoregressive": model})


def test_weights_are_named() -> None:
    assert set(DreamConfig().weights()) == {"minilm_l6", "centerface", "dinov2_small", "dlib_face"}
    assert SPEC.load() is Dream


def test_a_picture_with_too_many_pixels_is_refused(model: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    inputs = {"story": [write_story(tmp_path)], "autoregressive": model, "references": [tmp_path / "huge.png"]}
    with pytest.raises(StoryError, match="huge.png: more than 35,389,440 pixels .*: scale the picture down"):
        dream(tmp_path / "out", inputs)


def test_precision_is_part_of_the_recipe_and_changes_little(model: list[Path], tmp_path: Path) -> None:
    inputs = {"story": [write_story(tmp_path)], "autoregressive": model}
    _, full = dream(tmp_path / "full", inputs)
    _, half = dream(tmp_path / "half", inputs, precision="bfloat16")
    assert DreamConfig().recipe()["precision"] == "float32"
    assert full[0]["tokens"] != half[0]["tokens"]
    np.testing.assert_allclose(full[0]["tokens"], half[0]["tokens"], atol=0.5)
