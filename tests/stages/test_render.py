import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.autoencoder import load_autoencoder
from models.renderer import Renderer, save_renderer
from stages.errors import MissingInputError, UsageError
from stages.render import PICTURES_SCHEMA, SPEC, Render, RenderConfig
from tests.stages.test_train_renderer import write_autoencoder

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = RenderConfig(sampling_steps=2, batch_pictures=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    autoencoder = write_autoencoder(folder / "autoencoder")
    (folder / "renderer").mkdir()
    torch.manual_seed(0)
    renderer = Renderer(load_autoencoder(autoencoder), 6, 4, 15, 5)
    torch.nn.init.normal_(renderer.autoencoder.decoder.unet.conv_out.weight, std=0.05)  # untrained, it is silent
    save_renderer(renderer, folder / "renderer")
    return {"autoencoder": autoencoder, "renderer": sorted((folder / "renderer").iterdir())}


def _write_dream(path: Path, frames: int = 3, tokens: int = 16) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {
            "frame_index": frame,
            "shot_index": frame // 2,
            "script": "{}",
            "tokens": rng.normal(size=tokens).tolist(),
            "sentence_embeddings": rng.normal(size=6 * frame).tolist(),
            "face_embeddings": rng.normal(size=4 * (frame % 2)).tolist(),
        }
        for frame in range(frames)
    ]
    numbers = pa.list_(pa.float32())
    names = {"frame_index": pa.int64(), "shot_index": pa.int32(), "script": pa.string()}
    names |= dict.fromkeys(("tokens", "sentence_embeddings", "face_embeddings"), numbers)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(names.items()))), path)
    return path


def _render(models: dict[str, list[Path]], folder: Path, dream: Path, config: RenderConfig = CONFIG) -> list[dict]:
    calls: list[tuple[int, int]] = []
    progress = lambda done, total, message: calls.append((done, total))  # noqa: E731
    with tempfile.TemporaryDirectory() as scratch:
        summary = Render(config)({**models, "dream": [dream]}, folder, Path(scratch), progress)
    table = pq.read_table(folder / "pictures.parquet")
    assert table.schema == PICTURES_SCHEMA
    assert summary["pictures"] == len(table)
    assert calls[-1] == (len(table), len(table))
    return table.to_pylist()


def test_every_frame_becomes_a_picture(models, tmp_path):
    pictures = _render(models, tmp_path, _write_dream(tmp_path / "dream.parquet"))
    assert [(p["frame_index"], p["shot_index"]) for p in pictures] == [(0, 0), (1, 0), (2, 1)]
    for picture in pictures:
        with Image.open(io.BytesIO(picture["jpeg"])) as image:
            assert image.size == (picture["width_px"], picture["height_px"]) == (32, 16)


def test_pictures_follow_the_seed(models, tmp_path):
    dream = _write_dream(tmp_path / "dream.parquet")
    first, again = (_render(models, tmp_path, dream) for _ in range(2))
    assert first == again
    assert first != _render(models, tmp_path, dream, CONFIG.model_copy(update={"seed": 1}))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_pictures_do_not_depend_on_the_batch_they_are_in(models, tmp_path, scheduler):
    dream, config = _write_dream(tmp_path / "dream.parquet"), CONFIG.model_copy(update={"scheduler": scheduler})
    apart = config.model_copy(update={"batch_pictures": 1})
    for one, other in zip(*(_pixels(_render(models, tmp_path, dream, c)) for c in (config, apart)), strict=True):
        assert np.abs(one - other).max() <= 2


@pytest.mark.parametrize(
    "update", [{"scheduler": "DPMSolverMultistepScheduler", "sampling_steps": 4}, {"precision": "bfloat16"}]
)
def test_schedulers_and_precision_change_pictures(models, tmp_path, update):
    dream, other = _write_dream(tmp_path / "dream.parquet"), CONFIG.model_copy(update=update)
    assert _render(models, tmp_path, dream, other) != _render(models, tmp_path, dream)
    assert other.recipe() != CONFIG.recipe()


def test_bfloat16_changes_pictures_little(models, tmp_path):
    dream, halved = _write_dream(tmp_path / "dream.parquet"), CONFIG.model_copy(update={"precision": "bfloat16"})
    for one, other in zip(*(_pixels(_render(models, tmp_path, dream, c)) for c in (CONFIG, halved)), strict=True):
        assert np.abs(one - other).mean() < 4


def test_a_scheduler_that_does_not_fit_is_refused(models, tmp_path):
    config = CONFIG.model_copy(update={"scheduler": "NoScheduler"})
    with pytest.raises(UsageError, match=r"render.scheduler: scheduler 'NoScheduler' is no .* expected one of DDIM"):
        _render(models, tmp_path, _write_dream(tmp_path / "dream.parquet"), config)


def _pixels(rows: list[dict]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(row["jpeg"])), int) for row in rows]


def test_a_dream_without_frames_is_refused(models, tmp_path):
    with pytest.raises(MissingInputError, match="holds no frame"):
        _render(models, tmp_path, _write_dream(tmp_path / "dream.parquet", frames=0))


def test_tokens_of_another_width_are_refused(models, tmp_path):
    with pytest.raises(MissingInputError, match="tokens of frame 0 holds 15 numbers"):
        _render(models, tmp_path, _write_dream(tmp_path / "dream.parquet", tokens=15))


def test_the_spec_names_the_class():
    assert SPEC.load() is Render
    assert RenderConfig().weights() == ()


class StopRenderingError(Exception):
    """Stands for a kill."""


def test_a_killed_run_goes_on_with_the_pictures_that_are_missing(models, tmp_path):
    dream = _write_dream(tmp_path / "dream.parquet", frames=5)
    whole = _render(models, tmp_path, dream)
    told = []

    def stop(done, total, message):
        told.append(done)
        if len(told) == 1:
            raise StopRenderingError

    job, inputs = Render(CONFIG), {**models, "dream": [dream]}
    with pytest.raises(StopRenderingError):
        job(inputs, tmp_path, tmp_path / "scratch", stop)
    job(inputs, tmp_path, tmp_path / "scratch", stop)
    assert told == [2, 4, 5]  # the first batch once
    assert pq.read_table(tmp_path / "pictures.parquet").to_pylist() == whole
