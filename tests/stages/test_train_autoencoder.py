import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from models.feature_table import FeatureTable, feature_folders
from models.sdxl_decoder import load_unet
from stages.errors import ComputationError, MissingInputError, UsageError
from stages.spec import no_progress
from stages.train_autoencoder import SPEC, PhaseConfig, TrainAutoencoder, TrainAutoencoderConfig
from tests.stages.tiny_shards import write_features, write_shard
from tests.tiny_checkpoints import save_clip, save_sdxl

pytestmark = pytest.mark.usefixtures("one_thread")

PHASE = {"steps": 4, "compressor_steps": 1, "batch_size": 4, "learning_rate": 1e-3, "schedule": "cosine"}
TINY = {
    "image_phase": {"data": "crops", **PHASE},
    "film_phase": {"data": "keyframes", **PHASE},
    "pretrained": None,
    "token_dim": 8,
    "token_noise": 0.1,
    "compressor_width": 16,
    "compressor_heads": 2,
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


class StopTrainingError(Exception):
    """Stands for a kill."""


def _run(folder: Path, inputs: dict, config: TrainAutoencoderConfig, stop_at: int | None = None) -> Path:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)

    def progress(done: int, total: int, message: str) -> None:
        if stop_at is not None and done >= stop_at:
            raise StopTrainingError

    TrainAutoencoder(config)(inputs, out, scratch, progress)
    return out


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, list[Path]]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder: Path, split: str = "train", **settings) -> dict[str, list[Path]]:
    shards = [write_shard(folder / "shard-0.tar", split)]
    return {"shards": shards, "features": write_features(shards, folder / "features", **settings)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, inputs) -> Path:
    return _run(tmp_path_factory.mktemp("whole"), inputs, TrainAutoencoderConfig(**TINY))


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


def test_a_killed_run_ends_with_the_same_bytes(trained, inputs, tmp_path):
    config = TrainAutoencoderConfig(**TINY)
    for stop_at in (4, 7):  # after the checkpoints of steps 3 (first phase) and 6 (second phase)
        with pytest.raises(StopTrainingError):
            _run(tmp_path, inputs, config, stop_at)
    resumed = _run(tmp_path, inputs, config)
    for name in ("model.safetensors", "history.json", "metrics.json", "samples.parquet"):
        assert (resumed / name).read_bytes() == (trained / name).read_bytes(), name


def test_the_decoder_is_frozen_at_first(inputs, tmp_path):
    from safetensors.torch import load_file

    still = {**PHASE, "steps": 2, "compressor_steps": 2}
    tensors = []
    for steps in (0, 2):
        film = {"data": "keyframes", **still, "steps": steps}
        config = TrainAutoencoderConfig(
            **{**TINY, "image_phase": {**TINY["image_phase"], "steps": 0}, "film_phase": film}
        )
        tensors.append(load_file(_run(tmp_path / str(steps), inputs, config) / "model.safetensors"))
    changed = {name.split(".")[0] for name, value in tensors[0].items() if not torch.equal(value, tensors[1][name])}
    assert changed == {"compressor"}


def test_a_folder_of_pictures_can_be_the_first_phase(inputs, tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "pictures" / "deep" / "red.png")
    phase = {**TINY["image_phase"], "data": "images", "images_dir": tmp_path / "pictures", "steps": 1}
    film = {**TINY["film_phase"], "steps": 0}
    out = _run(tmp_path, inputs, TrainAutoencoderConfig(**{**TINY, "image_phase": phase, "film_phase": film}))
    assert len(json.loads((out / "history.json").read_text())) == 1


def test_damaged_pictures_of_the_folder_are_named_and_left_out(inputs, tmp_path, caplog):
    (tmp_path / "pictures").mkdir()
    for name in ("1-bad.png", "5-bad.jpg"):
        (tmp_path / "pictures" / name).write_bytes(b"no picture")
    phase = {**TINY["image_phase"], "data": "images", "images_dir": tmp_path / "pictures", "steps": 3}
    config = TrainAutoencoderConfig(**{**TINY, "image_phase": phase, "film_phase": {**TINY["film_phase"], "steps": 0}})
    with pytest.raises(ComputationError, match=r"none of the 2 pictures in .*pictures can be read: get them again"):
        _run(tmp_path, inputs, config)
    for place in (2, 3, 4, 6):
        Image.new("RGB", (20, 30), (40 * place, 10, 10)).save(tmp_path / "pictures" / f"{place}.png")
    space = FeatureTable(feature_folders(inputs["features"]), "keyframes").space
    made = TrainAutoencoder(config)._prepare_images(space, phase["images_dir"], tmp_path / "made")
    table = FeatureTable([made], "crops")
    assert [row // 2 for row in table.training_views()] == 2 * [1, 2, 3, 5]
    assert all(bool(table[2 * row][1].any()) == (row in (1, 2, 3, 5)) for row in range(6))
    assert "1-bad.png: cannot be read as a picture" in caplog.text
    assert len(json.loads((_run(tmp_path / "more", inputs, config) / "history.json").read_text())) == 3


def test_what_changes_nothing_is_not_in_the_recipe():
    small, large = (TrainAutoencoderConfig(**{**TINY, "pretrained": p}) for p in (None, "sdxl"))
    assert small.recipe()["layers"] == 1
    assert "layers" not in large.recipe()


def test_a_folder_of_pictures_may_be_moved_and_is_told_apart_by_what_it_holds(tmp_path):
    def recipe(folder):
        phase = {**TINY["image_phase"], "data": "images", "images_dir": folder}
        return TrainAutoencoderConfig(**{**TINY, "image_phase": phase}).recipe()

    (tmp_path / "here").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "here" / "a.png")
    before = recipe(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert recipe(tmp_path / "there") == before
    Image.new("RGB", (20, 30)).save(tmp_path / "there" / "b.png")
    assert recipe(tmp_path / "there") != before


def test_an_empty_folder_of_pictures_is_named(inputs, tmp_path):
    (tmp_path / "nothing").mkdir()
    phase = {**TINY["image_phase"], "data": "images", "images_dir": tmp_path / "nothing"}
    with pytest.raises(UsageError, match="nothing holds no picture"):
        _run(tmp_path, inputs, TrainAutoencoderConfig(**{**TINY, "image_phase": phase}))


def test_shards_without_training_keyframes_are_refused(tmp_path):
    (tmp_path / "heldout").mkdir()
    inputs = write_inputs(tmp_path / "heldout", split="test")
    with pytest.raises(MissingInputError, match="4 keyframes, none for training"):
        TrainAutoencoder(TrainAutoencoderConfig(**TINY))(inputs, tmp_path, tmp_path, no_progress)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"film_phase": {**TINY["film_phase"], "data": "crops"}}, "film_phase has data 'crops'"),
        ({"channels": (16, 18)}, "18"),
        ({"compressor_heads": 3}, "compressor_heads 3"),
        ({"image_phase": {**TINY["image_phase"], "data": "images"}}, "images_dir is None"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        TrainAutoencoderConfig(**{**TINY, **change})


def test_a_phase_of_crops_needs_crops(tmp_path):
    inputs = write_inputs(tmp_path, crops_per_keyframe=0)
    with pytest.raises(MissingInputError, match="set features.crops_per_keyframe"):
        _run(tmp_path, inputs, TrainAutoencoderConfig(**TINY))


def test_batches_that_other_processes_read_train_the_same(inputs, tmp_path):
    films_only = {**TINY, "image_phase": {**TINY["image_phase"], "steps": 0}}
    here = _run(tmp_path / "here", inputs, TrainAutoencoderConfig(**films_only))
    ahead = _run(tmp_path / "ahead", inputs, TrainAutoencoderConfig(**films_only, loader_workers=1))
    assert (ahead / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()


def test_sdxl_is_trained_further_from_its_folder(tmp_path):
    """CLIP, SDXL's VAE and UNet, in bfloat16 with checkpointed activations; killed and resumed; then read back."""
    from models.autoencoder import load_autoencoder
    from models.sdxl_decoder import SdxlDecoder

    sdxl, clip = save_sdxl(tmp_path / "sdxl"), save_clip(tmp_path / "clip")
    sizes = {"encoder_height_px": 28, "encoder_width_px": 28}
    inputs = write_inputs(tmp_path, image_encoder=str(clip), vae=str(sdxl), **sizes)
    paper = {"pretrained": str(sdxl), "prediction": "epsilon", "precision": "bfloat16", "gradient_checkpointing": True}
    config = TrainAutoencoderConfig(**{**TINY, **paper})
    assert config.is_heavy()
    assert "pretrained" not in config.recipe()
    whole = _run(tmp_path / "whole", inputs, config)
    with pytest.raises(StopTrainingError):
        _run(tmp_path / "killed", inputs, config, stop_at=5)
    resumed = _run(tmp_path / "killed", inputs, config)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    model = load_autoencoder(sorted(whole.iterdir()))
    assert isinstance(model.decoder, SdxlDecoder)
    assert not any(parameter.is_meta for parameter in model.parameters())
    sample = pq.read_table(whole / "samples.parquet").to_pylist()[0]
    with Image.open(io.BytesIO(sample["reconstruction"])) as picture:
        assert picture.size == (32, 16)


def test_two_processes_equal_one_with_two_micro_batches(tmp_path):
    """SDXL's decoder lies in two processes, a part of each weight in each; it is frozen in the first step."""
    from safetensors.torch import load_file

    sdxl = save_sdxl(tmp_path / "sdxl")
    inputs = write_inputs(tmp_path, vae=str(sdxl))
    paper = {"pretrained": str(sdxl), "prediction": "epsilon", "micro_batches": 2}
    film = {**TINY["film_phase"], "steps": 4, "schedule": "constant"}
    phases = {"image_phase": {**TINY["image_phase"], "steps": 0}, "film_phase": film, "average_decay": 0.0}
    one = _run(tmp_path / "one", inputs, TrainAutoencoderConfig(**{**TINY, **phases, **paper}))
    two = _run(tmp_path / "two", inputs, TrainAutoencoderConfig(**{**TINY, **phases, **paper, "processes": 2}))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    start = {f"decoder.unet.{name}": weight for name, weight in load_unet(sdxl).state_dict().items()}
    moved = [torch.cat([(model[name] - start[name]).flatten() for name in start]) for model in (first, second)]
    assert moved[0].abs().mean() > 1e-4
    # Steps of AdamW have the size of the rate whatever the gradient's, so where it is nearly zero, rounding decides.
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.98
    losses = [[point["loss"] for point in json.loads((f / "history.json").read_text())] for f in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(ValidationError, match="film_phase.batch_size 6 cannot be cut into 4"):
        TrainAutoencoderConfig(**{**TINY, "film_phase": {**TINY["film_phase"], "batch_size": 6}, "micro_batches": 4})


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
    assert (config.noise_offset, config.tokens, config.prediction) == (0.05, 2, "epsilon")
    assert config.weights() == ("sdxl",)
    assert isinstance(first, PhaseConfig)
    assert SPEC.load() is TrainAutoencoder
