import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.video_diffusion import ClipSettings, VideoDiffusion
from models.weights import WeightsError
from tests.tiny_checkpoints import save_svd

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ClipSettings(frames=4, height_px=64, width_px=128, steps=2, decode_frames=2)
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (40, 72, 3), dtype=np.uint8)
DIFFUSERS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", params=["fp16", None])
def folder(request, tmp_path_factory) -> Path:
    return save_svd(tmp_path_factory.mktemp("svd"), request.param)


@pytest.fixture(scope="module")
def model(folder) -> VideoDiffusion:
    return VideoDiffusion(folder)


def make_with_the_published_pipeline(folder: Path, settings: ClipSettings) -> np.ndarray:
    from diffusers import StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    variant = "fp16" if (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists() else None
    pipeline = StableVideoDiffusionPipeline.from_pretrained(
        folder,
        variant=variant,
        low_cpu_mem_usage=False,
        feature_extractor=CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor"),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(
            folder / "image_encoder", variant=variant, dtype=torch.float32
        ),
    ).to(torch.float32)
    made = pipeline(
        Image.fromarray(PICTURE), height=settings.height_px, width=settings.width_px, num_frames=settings.frames,
        num_inference_steps=settings.steps, min_guidance_scale=settings.min_guidance,
        max_guidance_scale=settings.max_guidance, decode_chunk_size=settings.decode_frames,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    return np.stack([np.asarray(frame) for frame in made.frames[0]])


@DIFFUSERS
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_under_its_own_anchor_a_clip_is_what_the_published_pipeline_makes(folder, model, guidance):
    settings = ClipSettings(**{**vars(SETTINGS), "max_guidance": guidance})
    made = model.generate(PICTURE, model.embed(PICTURE), settings, seed=3)
    assert made.shape == (4, 64, 128, 3) and made.dtype == np.uint8
    assert np.array_equal(made, make_with_the_published_pipeline(folder, settings))


def test_the_anchor_the_picture_and_the_seed_each_change_a_clip(model):
    anchor = model.embed(PICTURE)
    first, again, other_anchor, other_picture, other_seed = (
        model.generate(picture, feature, SETTINGS, seed)
        for picture, feature, seed in (
            (PICTURE, anchor, 0),
            (PICTURE, anchor, 0),
            (PICTURE, model.embed(OTHER), 0),
            (OTHER, anchor, 0),
            (PICTURE, anchor, 1),
        )
    )
    assert np.array_equal(first, again)
    for changed in (other_anchor, other_picture, other_seed):
        assert not np.array_equal(first, changed)


def test_every_denoising_step_is_told(model):
    steps = []
    model.generate(PICTURE, model.embed(PICTURE), SETTINGS, 0, steps.append)
    assert steps == [1, 2]


def test_offloading_changes_nothing(folder, model):
    offloading = VideoDiffusion(folder, offload=True)
    made = [m.generate(PICTURE, m.embed(OTHER), SETTINGS, 0) for m in (model, offloading)]
    assert np.array_equal(*made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_offloading_leaves_the_accelerator_empty(folder):
    offloading = VideoDiffusion(folder, precision="float16", offload=True)
    before = torch.cuda.memory_allocated()
    offloading.generate(PICTURE, offloading.embed(PICTURE), SETTINGS, 0)
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_bfloat16_makes_nearly_the_same(model, folder):
    halved = VideoDiffusion(folder, precision="bfloat16")
    made = [m.generate(PICTURE, m.embed(PICTURE), SETTINGS, 0).astype(int) for m in (model, halved)]
    assert 0 < np.abs(made[0] - made[1]).mean() < 16


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "svd"))


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder", "scheduler", "feature_extractor"])
def test_a_missing_part_is_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(WeightsError, match=rf"at {copied} has no folder {part}: expected unet, vae"):
        VideoDiffusion(copied)


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder"])
def test_a_part_without_weights_is_named(copied, part):
    next((copied / part).glob("*.safetensors")).unlink()
    with pytest.raises(
        WeightsError, match=rf"cannot read {part} of Stable Video Diffusion at {copied / part}: .*fetch it again"
    ):
        VideoDiffusion(copied)


@pytest.mark.parametrize("part", ["unet", "image_encoder"])
def test_weights_that_lack_a_layer_are_refused(copied, part):
    from safetensors.torch import load_file, save_file

    path = next((copied / part).glob("*.safetensors"))
    state = load_file(path)
    state.pop(min(state))
    save_file(state, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=f"{copied / part} lacks weights of its model"):
        VideoDiffusion(copied)


def test_whole_files_are_preferred_where_halved_ones_would_lose(tmp_path):
    save_svd(tmp_path, "fp16")
    save_svd(tmp_path, None)
    whole = VideoDiffusion(save_svd(tmp_path / "whole", None))
    assert np.array_equal(VideoDiffusion(tmp_path).embed(PICTURE), whole.embed(PICTURE))
    halved = VideoDiffusion(save_svd(tmp_path / "halved", "fp16"))
    assert not np.array_equal(halved.embed(PICTURE), whole.embed(PICTURE))
