import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from pydantic import ValidationError

from stages.errors import MissingInputError, UsageError
from stages.spec import no_progress
from stages.train_autoencoder import SPEC, PhaseConfig, TrainAutoencoder, TrainAutoencoderConfig

PHASE = {"steps": 4, "compressor_steps": 1, "batch_size": 4, "learning_rate": 1e-3, "schedule": "cosine"}
TINY = {
    "image_phase": {"data": "crops", "height_px": 16, "width_px": 16, **PHASE},
    "film_phase": {"data": "keyframes", "height_px": 16, "width_px": 32, **PHASE},
    "encoder_height_px": 28,
    "encoder_width_px": 56,
    "token_dim": 8,
    "token_noise": 0.1,
    "compressor_width": 16,
    "compressor_heads": 2,
    "luma": 6,
    "chroma": 3,
    "channels": (16, 16),
    "layers": 1,
    "cross_dim": 16,
    "heads": 2,
    "norm_groups": 4,
    "draft_components": 3,
    "draft_width": 16,
    "prediction": "v_prediction",
    "sampling_steps": 2,
    "sample_keyframes": 3,
    "checkpoint_every_steps": 3,
}


def write_shard(path: Path, split: str = "train") -> Path:
    """A shard of two films with two keyframes each."""
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(path), mtime=0) as shard:
        for place in range(4):
            film, frame = f"film{place // 2}", 30 * (place % 2)
            picture = Image.fromarray(rng.integers(0, 255, (3, 5, 3), np.uint8)).resize(
                (40, 24), Image.Resampling.BICUBIC
            )
            jpeg = io.BytesIO()
            picture.save(jpeg, "JPEG")
            about = {"film_id": film, "frame_index": frame, "split": split, "faces": []}
            shard.write({"__key__": f"{film}-{frame:08d}", "jpg": jpeg.getvalue(), "json": json.dumps(about).encode()})
    return path


class StopTrainingError(Exception):
    """Stands for a kill."""


def _run(folder: Path, shard: Path, config: TrainAutoencoderConfig, stop_at: int | None = None) -> Path:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)

    def progress(done: int, total: int, message: str) -> None:
        if stop_at is not None and done >= stop_at:
            raise StopTrainingError

    TrainAutoencoder(config)({"shards": [shard]}, out, scratch, progress)
    return out


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("shards") / "shard-0.tar")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shard) -> Path:
    return _run(tmp_path_factory.mktemp("whole"), shard, TrainAutoencoderConfig(**TINY))


def test_the_artifact_holds_what_is_promised(trained):
    assert {path.name for path in trained.iterdir()} == {
        "model.safetensors",
        "config.json",
        "history.json",
        "metrics.json",
        "samples.parquet",
    }
    history = json.loads((trained / "history.json").read_text())
    assert [(entry["phase"], entry["step"]) for entry in history] == [
        (phase, step) for phase in ("images", "films") for step in range(1, 5)
    ]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics["retrieval_top1_by_film"]) == {"film0", "film1"}
    assert metrics["keyframes"] == 4
    samples = pq.read_table(trained / "samples.parquet").to_pylist()
    assert len(samples) == 3
    with Image.open(io.BytesIO(samples[0]["reconstruction"])) as picture:
        assert picture.size == (32, 16)


def test_a_killed_run_ends_with_the_same_bytes(trained, shard, tmp_path):
    config = TrainAutoencoderConfig(**TINY)
    for stop_at in (4, 7):  # after the checkpoints of steps 3 (first phase) and 6 (second phase)
        with pytest.raises(StopTrainingError):
            _run(tmp_path, shard, config, stop_at)
    resumed = _run(tmp_path, shard, config)
    for name in ("model.safetensors", "history.json", "metrics.json", "samples.parquet"):
        assert (resumed / name).read_bytes() == (trained / name).read_bytes(), name


def test_the_decoder_is_frozen_at_first(shard, tmp_path):
    from safetensors.torch import load_file

    still = {**PHASE, "steps": 2, "compressor_steps": 2}
    tensors = []
    for steps in (0, 2):
        film = {"data": "keyframes", "height_px": 16, "width_px": 32, **still, "steps": steps}
        config = TrainAutoencoderConfig(
            **{**TINY, "image_phase": {**TINY["image_phase"], "steps": 0}, "film_phase": film}
        )
        tensors.append(load_file(_run(tmp_path / str(steps), shard, config) / "model.safetensors"))
    changed = {name.split(".")[0] for name, value in tensors[0].items() if not torch.equal(value, tensors[1][name])}
    assert changed == {"compressor"}


def test_a_folder_of_pictures_can_be_the_first_phase(shard, tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "pictures" / "deep" / "red.png")
    phase = {**TINY["image_phase"], "data": "images", "images_dir": tmp_path / "pictures", "steps": 1}
    film = {**TINY["film_phase"], "steps": 0}
    out = _run(tmp_path, shard, TrainAutoencoderConfig(**{**TINY, "image_phase": phase, "film_phase": film}))
    assert len(json.loads((out / "history.json").read_text())) == 1


def test_an_empty_folder_of_pictures_is_named(shard, tmp_path):
    (tmp_path / "nothing").mkdir()
    phase = {**TINY["image_phase"], "data": "images", "images_dir": tmp_path / "nothing"}
    with pytest.raises(UsageError, match="nothing holds no picture"):
        _run(tmp_path, shard, TrainAutoencoderConfig(**{**TINY, "image_phase": phase}))


def test_shards_without_training_keyframes_are_refused(tmp_path):
    shard = write_shard(tmp_path / "heldout.tar", split="test")
    with pytest.raises(MissingInputError, match="4 keyframes, none for training"):
        TrainAutoencoder(TrainAutoencoderConfig(**TINY))({"shards": [shard]}, tmp_path, tmp_path, no_progress)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"film_phase": {**TINY["film_phase"], "width_px": 30}}, "30x16"),
        ({"film_phase": {**TINY["film_phase"], "data": "crops"}}, "film_phase has data 'crops'"),
        ({"encoder_width_px": 50}, "50x28"),
        ({"channels": (16, 18)}, "18"),
        ({"compressor_heads": 3}, "compressor_heads 3"),
        ({"image_phase": {**TINY["image_phase"], "data": "images"}}, "images_dir is None"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        TrainAutoencoderConfig(**{**TINY, **change})


def test_defaults_are_the_papers():
    config = TrainAutoencoderConfig()
    first, second = config.image_phase, config.film_phase
    assert (first.steps, first.learning_rate, first.schedule, first.compressor_steps) == (
        120_000,
        1e-4,
        "cosine",
        20_000,
    )
    assert (second.steps, second.learning_rate, second.schedule) == (120_000, 2e-5, "constant")
    assert (first.height_px, first.width_px, second.height_px, second.width_px) == (768, 768, 512, 896)
    assert (config.noise_offset, config.tokens, config.prediction) == (0.05, 2, "epsilon")
    assert config.weights() == ("dinov2_small",)
    assert isinstance(first, PhaseConfig)
    assert SPEC.load() is TrainAutoencoder
