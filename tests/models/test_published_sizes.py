"""Parameters, outputs and memory of the paper's networks at the sizes at which they are published, on fake tensors."""

import pytest
import torch
import transformers

from models import training_workloads, workloads
from models.autoencoder_sizes import Architecture
from models.published_sizes import PUBLISHED, TINY
from models.training_workloads import StepSettings
from models.weights_table import TABLE
from stages.train_autoencoder import TrainAutoencoderConfig

ARCHITECTURE = Architecture.from_settings(TrainAutoencoderConfig(), training_workloads.published_space())

# Each with its parameters as counted in the published files; None where the project builds a part of them.
INFERENCE = [
    (workloads.clip_patches(pictures=16), 303_179_776, ("float32[16, 257, 1024]",)),
    (workloads.clip(pictures=4), 427_616_513, ("float32[4, 768]", "float32[4, 768]")),
    (workloads.longclip(sentences=4), 123_781_632, ("float32[4, 768]",)),
    (workloads.farl(), 86_192_640, ("float32[1, 512]",)),
    (workloads.vae_encode(), 83_653_863, ("float32[1, 4, 64, 112]",)),
    (workloads.vae_decode(), 83_653_863, ("float32[1, 3, 512, 896]",)),
    (workloads.svd_image_encoder(), 632_076_800, ("float16[1, 1024]",)),
    (workloads.svd_decode(frames=2), 97_742_847, ("float16[2, 3, 576, 1024]",)),
    (workloads.chat_word("deepseek_vl_7b"), 7_331_390_721, ("bfloat16[8, 1, 102400]",)),
    (workloads.chat_prompt("qwen3_vl_8b"), 8_767_123_696, ("bfloat16[8, 1, 151936]",)),
    (training_workloads.story_frame(), 6_697_627_664, ("float32[2, 256]",)),
]
HEAVY = [
    (workloads.grounding_dino(), 232_315_264, ("float32[1, 900, 4]", "float32[1, 900, 256]")),
    (workloads.sam2(), 216_924_865, ("float32[1, 5, 1, 256, 256]",)),
    (workloads.svd_unet(), 1_524_623_082, ("float16[2, 25, 4, 72, 128]",)),
    (workloads.chat_prompt("deepseek_vl_7b"), 7_331_390_721, ("bfloat16[8, 1, 102400]",)),
    (training_workloads.renderer_denoising(ARCHITECTURE), 2_590_804_358, ("float32[16, 4, 64, 112]",)),
]


def check_inference(workload, parameters, outputs):
    found = workload.footprint()
    assert found.parameters == parameters
    assert found.outputs == outputs
    assert found.parameter_bytes <= found.resident_bytes < found.peak_bytes
    assert found.flops > 0


@pytest.mark.parametrize(("workload", "parameters", "outputs"), INFERENCE, ids=lambda v: getattr(v, "name", ""))
def test_networks_have_the_published_size(workload, parameters, outputs):
    check_inference(workload, parameters, outputs)


@pytest.mark.slow
@pytest.mark.parametrize(("workload", "parameters", "outputs"), HEAVY, ids=lambda v: getattr(v, "name", ""))
def test_large_networks_have_the_published_size(workload, parameters, outputs):
    check_inference(workload, parameters, outputs)


@pytest.mark.parametrize(
    ("name", "megabytes", "bytes_each"),
    [
        ("qwen3_vl_8b", 8_767.123696 * 2, 2),
        # UNet, VAE in float32, and the text encoders CLIP ViT-L and OpenCLIP bigG.
        ("sdxl", (2_567.463684 + 83.653863 * 2 + 123.060480 + 694.659840) * 2, 2),
    ],
)
def test_published_files_are_as_large_as_the_parameters(name, megabytes, bytes_each):
    """The sizes of files in the table of weights were read from the hubs."""
    assert TABLE[name].size_mb == pytest.approx(megabytes, rel=0.001)


def test_sdxls_unet_has_the_published_size():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED["sdxl"]["unet"])
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684


def test_sam2_with_its_memory_has_the_published_size():
    """Its makers count 224.4M, of which still pictures need those that `Sam2Model` has."""
    parts = workloads.describe_sam2()
    config = transformers.Sam2VideoConfig(
        vision_config=parts.vision_config, prompt_encoder_config=parts.prompt_encoder_config,
        mask_decoder_config=parts.mask_decoder_config,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Sam2VideoModel(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(224.4e6, rel=0.005)


def test_llama_is_counted_without_its_head_and_with_what_is_new():
    """LLaMA2-7B is 6,738,415,616 with the table that turns vectors into words, which the story model does not use."""
    fields = PUBLISHED["llama2_7b"]["trunk"]
    with torch.device("meta"):
        whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    assert sum(p.numel() for p in whole.parameters()) == 6_738_415_616
    trunk = sum(p.numel() for p in whole.model.parameters())
    hidden, dim, components = fields["hidden_size"], 256, 16
    projections = sum(width * hidden + hidden + hidden * hidden + hidden for width in (768, 512, dim))
    head = (hidden + 1) * (components + 2 * components * dim)
    new = projections + head + 2 * hidden
    found = training_workloads.story_frame().footprint()
    assert found.parameters == trunk + new


@pytest.mark.slow
def test_a_step_of_the_story_model():
    settings = StepSettings(optimizer=False, half_layers=True)
    found = training_workloads.story_step(settings).footprint()
    assert found.parameters == 6_697_627_664
    trained = found.parameters - 32_000 * 4096  # the table of words stays frozen
    assert found.state_bytes == 16 * trained + 4 * 32_000 * 4096
    # Forward, recomputed forward, and twice as much backward over 3988 positions; attention comes on top.
    products = 4 * 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) * (128 * 31 + 20)
    assert products < found.flops < 1.25 * products
    longer = training_workloads.story_step(StepSettings(2, optimizer=False, half_layers=True)).footprint()
    assert longer.flops == pytest.approx(2 * found.flops, rel=0.01)
    assert 1.8 < longer.working_bytes / found.working_bytes < 2.2
    kept = training_workloads.story_step(StepSettings(1, "bfloat16", False, False, True)).footprint()
    assert kept.working_bytes > 4 * found.working_bytes
    assert kept.flops < 0.8 * found.flops


@pytest.mark.slow
def test_a_step_of_sdxls_unet():
    half = StepSettings(optimizer=False, half_layers=True)
    found = training_workloads.autoencoder_step(ARCHITECTURE, half, 768, 768).footprint()
    frozen = training_workloads.autoencoder_step(ARCHITECTURE, half, 768, 768, decoder_frozen=True).footprint()
    assert found.parameters == frozen.parameters == 2_579_786_118
    assert found.state_bytes == 20 * found.parameters  # with the moving average
    assert frozen.state_bytes < 0.5 * found.state_bytes
    assert frozen.flops < found.flops


def test_tiny_networks_have_all_the_parts():
    assert {name: set(parts) for name, parts in TINY.items()} == {name: set(parts) for name, parts in PUBLISHED.items()}
