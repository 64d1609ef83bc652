"""Tokens of keyframes and of their mirror images, from shards."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from models.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from models.autoencoder_sizes import Architecture
from models.feature_table import FeatureTable
from models.script import Character, FrameScript
from models.token_table import TokenTable
from stages.errors import MissingInputError
from stages.spec import no_progress
from stages.tokenize import SPEC, Tokenize, TokenizeConfig
from tests.stages.tiny_shards import write_features

pytestmark = pytest.mark.usefixtures("one_thread")

# webdataset leaves it to the garbage collector to close the tars that it reads.

SIZES = SimpleNamespace(
    tokens=2, token_dim=8, compressor_width=16, compressor_heads=2, pretrained=None, flattening=0.5, channels=(16, 16),
    layers=1, cross_dim=16, heads=2, norm_groups=4, draft_components=0, draft_width=16, timesteps=100,
    prediction="v_prediction",
)  # fmt: skip


def write_shard(path: Path, samples: list[dict[str, Any]]) -> Path:
    from webdataset import TarWriter

    with path.open("wb") as stream, TarWriter(stream, mtime=0.0, encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def make_sample(film: str, frame_index: int, size: tuple[int, int] = (36, 64), characters: tuple = (0,)) -> dict:
    rng = np.random.default_rng(frame_index)
    script = FrameScript(
        characters=[Character(identity="Person 1", character_index=0, description=["Person 1 wears red."])],
        plot=["Person 1 is on the left."],
    )
    facts = {
        "film_id": film, "frame_index": frame_index, "time_s": frame_index / 10, "shot_index": 0, "split": "train",
        "script": script.model_dump(), "faces": [{"character_index": c} for c in characters],
    }  # fmt: skip
    stream = io.BytesIO()
    np.save(stream, rng.standard_normal((len(characters), 6)).astype(np.float32))
    picture = cv2.resize(rng.integers(0, 255, (4, 6, 3), np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
    key = f"{film}-{frame_index:08d}"
    return {"__key__": key, "jpg": jpeg, "json": json.dumps(facts).encode(), "faces.npy": stream.getvalue()}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("autoencoder")
    features = write_features([write_shard(folder / "0.tar", [make_sample("a", 0)])], folder / "features")
    space = FeatureTable([features[0].parent], "keyframes").space
    torch.manual_seed(0)
    save_autoencoder(Autoencoder(Architecture.from_settings(SIZES, space)), folder)
    return [folder / "config.json", folder / "model.safetensors"]


@pytest.fixture(scope="module")
def tokenize(autoencoder: list[Path]) -> Callable[..., Any]:
    stage = Tokenize(TokenizeConfig(batch_pictures=2))

    def run(shards: list[Path], out: Path, **settings: Any) -> TokenTable:
        out.mkdir(exist_ok=True)
        features = write_features(shards, out / "features", **settings)
        inputs = {"shards": shards, "features": features, "autoencoder": autoencoder}
        summary = stage(inputs, out, out, no_progress)
        table = TokenTable(out)
        assert summary["keyframes"] == len(table)
        return table

    return run


def test_rows_are_sorted_and_complete(tokenize: Callable[..., Any], autoencoder: list[Path], tmp_path: Path) -> None:
    samples = [make_sample("b", 5), make_sample("b", 10, characters=(None, 1)), make_sample("b", 0, characters=())]
    first = write_shard(tmp_path / "0.tar", samples)
    second = write_shard(tmp_path / "1.tar", [make_sample("a film", 0, size=(40, 40))])
    table = tokenize([first, second], tmp_path / "out")
    assert table.films == ["a film", "b", "b", "b"]
    assert table.widths == {"tokens_per_frame": 2, "token_dim": 8, "text_width": 384, "face_width": 6}
    assert table.split_rows("train") == [0, 1, 2, 3]
    assert table.faces_of("b", 0) == [(2, 0)]
    assert table.faces_of("b", 1) == [(3, 1)]
    assert (table.characters("a film"), table.characters("b"), table.characters("c")) == ([0], [0, 1], [])
    np.testing.assert_array_equal(table.face(3, 1), np.load(io.BytesIO(samples[1]["faces.npy"]))[1])
    model = load_autoencoder(autoencoder)
    picture = cv2.imdecode(np.frombuffer(samples[0]["jpg"], np.uint8), cv2.IMREAD_COLOR_RGB)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    np.testing.assert_allclose(table.tokens(2), model.encode(image)[0].numpy(), atol=0.02)
    np.testing.assert_allclose(table.tokens(2, mirrored=True), model.encode(image.flip(-1))[0].numpy(), atol=0.02)


def test_scripts_and_sentences_are_mirrored_too(tokenize: Callable[..., Any], tmp_path: Path) -> None:
    table = tokenize([write_shard(tmp_path / "0.tar", [make_sample("a", 0)])], tmp_path / "out")
    assert table.script(0).plot == ["Person 1 is on the left."]
    assert table.script(0, mirrored=True).plot == ["Person 1 is on the right."]
    plain, mirrored = table.sentences(0), table.sentences(0, mirrored=True)
    assert plain.shape == (2, 384)
    np.testing.assert_array_equal(plain[0], mirrored[0])
    assert not np.allclose(plain[1], mirrored[1])


def test_same_shards_same_bytes_and_other_files_are_ignored(tokenize: Callable[..., Any], tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", [make_sample("a", 0), make_sample("a", 5)])
    (tmp_path / "index.json").write_text("{}")
    for name in ("one", "two"):
        tokenize([tmp_path / "index.json", shard], tmp_path / name)
    for file in ("tokens.arrow", "sentences.arrow", "tokens.json"):
        one, two = (tmp_path / name / file for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), file


def test_a_keyframe_without_a_script_or_faces(tokenize: Callable[..., Any], tmp_path: Path) -> None:
    sample = make_sample("a", 0, characters=())
    sample["json"] = json.dumps(json.loads(sample["json"]) | {"script": {}}).encode()
    table = tokenize([write_shard(tmp_path / "0.tar", [sample])], tmp_path / "out")
    assert table.sentences(0).shape == (0, 384)
    assert table.widths["face_width"] == 1
    assert table.frame(0, np.random.default_rng(0)).faces == {}


def test_features_of_other_models_are_not_used(tokenize: Callable[..., Any], tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", [make_sample("a", 0), make_sample("a", 5)])
    same, other = tokenize([shard], tmp_path / "same"), tokenize([shard], tmp_path / "other", luma=4)
    np.testing.assert_allclose(same.tokens(1), other.tokens(1), atol=0.02)


def test_empty_shards(tokenize: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="the shards hold no keyframe: ingest a film first"):
        tokenize([write_shard(tmp_path / "0.tar", [])], tmp_path / "out")


def test_a_keyframe_without_features_is_named(autoencoder: list[Path], tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", [make_sample("a", 0)])
    other = write_shard(tmp_path / "1.tar", [make_sample("a", 7)])
    inputs = {"shards": [other], "features": write_features([shard], tmp_path / "f"), "autoencoder": autoencoder}
    with pytest.raises(MissingInputError, match="keyframe a-00000007 has no features"):
        Tokenize(TokenizeConfig())(inputs, tmp_path, tmp_path, no_progress)


def test_weights_are_named() -> None:
    assert set(TokenizeConfig().weights()) == {"minilm_l6"}
    assert SPEC.load() is Tokenize
