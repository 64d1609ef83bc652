import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.autoencoder import Autoencoder, save_autoencoder
from models.autoencoder_sizes import Architecture
from models.feature_table import describe_space
from models.script import FrameScript
from models.token_table import write_token_table
from stages.errors import MissingInputError
from stages.spec import no_progress
from stages.train_autoencoder import TrainAutoencoderConfig
from stages.train_renderer import SPEC, TrainRenderer, TrainRendererConfig
from tests.stages.test_train_autoencoder import TINY, StopTrainingError
from tests.stages.tiny_shards import SMALL, write_features, write_shard

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "steps": 4,
    "batch_size": 3,
    "learning_rate": 1e-3,
    "token_noise": 0.1,
    "sampling_steps": 2,
    "sample_keyframes": 2,
    "checkpoint_every_steps": 2,
}


def _script(character: int | None) -> str:
    people = [{"identity": "Person 1", "character_index": character, "description": ["a man"]}]
    script = {
        "characters": people if character is not None else [],
        "scene_elements": ["a street"],
        "plot": ["he walks"],
    }
    return FrameScript.model_validate(script).model_dump_json()


def write_tokens(
    folder: Path, frames: tuple[int, ...] = (0, 30), faces: bool = True, split: str = "train"
) -> list[Path]:
    rng = np.random.default_rng(0)
    rows = []
    for film in ("film0", "film1"):
        for frame in frames:
            script = _script(0 if faces and film == "film0" else None)
            sentences = rng.normal(size=(len(FrameScript.model_validate_json(script).sentences()), 6)).astype(
                np.float32
            )
            rows.append(
                {
                    "film_id": film,
                    "frame_index": frame,
                    "time_s": float(frame),
                    "shot_index": 0,
                    "split": split,
                    "tokens": rng.normal(size=(2, 8)).astype(np.float32),
                    "mirrored_tokens": rng.normal(size=(2, 8)).astype(np.float32),
                    "script": script,
                    "mirrored_script": script,
                    "sentence_embeddings": sentences,
                    "mirrored_sentence_embeddings": sentences,
                    "face_character": [-1, 0] if faces and film == "film0" else [],
                    "face_embeddings": rng.normal(size=(2, 4) if faces and film == "film0" else (0, 4)).astype(
                        np.float32
                    ),
                }
            )
    table = folder / "tokens"
    table.mkdir(parents=True)
    write_token_table([rows], table, {"tokens_per_frame": 2, "token_dim": 8, "text_width": 6, "face_width": 4})
    return sorted(table.iterdir())


def write_autoencoder(folder: Path, **changes) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL.items() if name not in ("luma", "chroma", "vae", "image_encoder")}
    space = describe_space(None, "dinov2_small", None, 6, 3, 8, **sizes)
    settings = TrainAutoencoderConfig(**{**TINY, **changes})
    save_autoencoder(Autoencoder(Architecture.from_settings(settings, space)), folder)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("inputs")
    shards = [write_shard(folder / "shard-0.tar")]
    return {
        "shards": shards,
        "features": write_features(shards, folder / "features"),
        "tokens": write_tokens(folder),
        "autoencoder": write_autoencoder(folder / "autoencoder"),
    }


def _run(folder: Path, inputs: dict[str, list[Path]], stop_at: int | None = None) -> Path:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)

    def progress(done: int, total: int, message: str) -> None:
        if stop_at is not None and done >= stop_at:
            raise StopTrainingError

    TrainRenderer(TrainRendererConfig(**CONFIG))(inputs, out, scratch, progress)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, inputs) -> Path:
    return _run(tmp_path_factory.mktemp("whole"), inputs)


def test_the_artifact_holds_what_is_promised(trained):
    names = {"model.safetensors", "config.json", "history.json", "metrics.json", "samples.parquet"}
    assert {path.name for path in trained.iterdir()} == names
    assert [entry["step"] for entry in json.loads((trained / "history.json").read_text())] == [1, 2, 3, 4]
    sizes = json.loads((trained / "config.json").read_text())
    assert sizes == {"text_dim": 6, "face_dim": 4, "max_sentences": 15, "max_faces": 5}
    assert json.loads((trained / "metrics.json").read_text())["keyframes"] == 4


def test_a_killed_run_ends_with_the_same_bytes(trained, inputs, tmp_path):
    with pytest.raises(StopTrainingError):
        _run(tmp_path, inputs, stop_at=3)
    resumed = _run(tmp_path, inputs)
    for name in ("model.safetensors", "history.json", "metrics.json", "samples.parquet"):
        assert (resumed / name).read_bytes() == (trained / name).read_bytes(), name


def test_without_faces_the_renderer_takes_none(inputs, tmp_path):
    tokens = write_tokens(tmp_path, faces=False)
    out = _run(tmp_path, {**inputs, "tokens": tokens})
    assert json.loads((out / "config.json").read_text())["max_faces"] == 0


def test_tokens_of_other_shards_are_refused(inputs, tmp_path):
    tokens = write_tokens(tmp_path, frames=(0, 60))
    with pytest.raises(MissingInputError, match="2 keyframes have tokens and no features, first frame 60 of film0"):
        _run(tmp_path, {**inputs, "tokens": tokens})


def test_tokens_without_training_keyframes_are_refused(inputs, tmp_path):
    tokens = write_tokens(tmp_path, split="heldout")
    with pytest.raises(MissingInputError, match="none for training"):
        TrainRenderer(TrainRendererConfig(**CONFIG))({**inputs, "tokens": tokens}, tmp_path, tmp_path, no_progress)


def test_defaults_are_the_papers():
    config = TrainRendererConfig()
    assert (config.max_sentences, config.max_faces, config.mask_probability) == (15, 5, 0.2)
    assert SPEC.load() is TrainRenderer
