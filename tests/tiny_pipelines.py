"""Tiny diffusers pipelines with random weights, in the layout and with the file names that their makers publish."""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

CLIP_ENDS = ["<|startoftext|>", "<|endoftext|>"]


def write_sdxl_pipeline(folder: Path) -> Path:
    """SDXL: half-precision files for all but the autoencoder, pixels of twice the latents' sides."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), cross_attention_dim=64,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    parts = {
        "unet": unet,
        "vae": _make_vae(),
        "text_encoder": transformers.CLIPTextModel(_words(hidden_act="quick_gelu")),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(_words(hidden_act="gelu")),
        "tokenizer": _make_tokenizer(CLIP_ENDS[1]),
        "tokenizer_2": _make_tokenizer("!"),
        "scheduler": diffusers.EulerDiscreteScheduler(**_SCHEDULE),
    }
    _sharpen(parts["unet"], parts["text_encoder"], parts["text_encoder_2"])
    pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    pipeline.vae.float().save_pretrained(folder / "vae")
    _publish_tokenizers(folder)
    return folder


def write_sd15_pipeline(folder: Path) -> Path:
    """Stable Diffusion 1.5, whose index also names a safety checker and an image processor that are not there."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8, cross_attention_dim=32,
    )  # fmt: skip
    encoder = transformers.CLIPTextModel(_words(hidden_act="quick_gelu"))
    _sharpen(unet, encoder)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=_make_vae(), text_encoder=encoder, tokenizer=_make_tokenizer(CLIP_ENDS[1]), unet=unet,
        scheduler=diffusers.PNDMScheduler(**_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    _publish_tokenizers(folder)
    return folder


def write_motion_adapter(folder: Path) -> Path:
    """AnimateDiff's motion modules for `write_sd15_pipeline`."""
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4,
        motion_mid_block_layers_per_block=1, motion_max_seq_length=32, use_motion_mid_block=True,
    )  # fmt: skip
    adapter.save_pretrained(folder)
    return folder


def write_svd_pipeline(folder: Path, frames: int = 4) -> Path:
    """Stable Video Diffusion with clips of a few frames."""
    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=(2, 4), addition_time_embed_dim=32, projection_class_embeddings_input_dim=96,
        num_frames=frames,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, sample_size=32
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
        image_size=224, patch_size=56,
    )  # fmt: skip
    encoder = transformers.CLIPVisionModelWithProjection(vision)
    scheduler = diffusers.EulerDiscreteScheduler(
        **_SCHEDULE, prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
        timestep_type="continuous", interpolation_type="linear",
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae, "image_encoder": encoder}
    for name, part in parts.items():
        part.half().save_pretrained(folder / name, variant="fp16")
    scheduler.save_pretrained(folder / "scheduler")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224)
    processor.save_pretrained(folder / "feature_extractor")
    index = {
        "_class_name": "StableVideoDiffusionPipeline",
        "_diffusers_version": "0.24.0.dev0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
        "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def _make_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=32,
    )  # fmt: skip


def _words(hidden_act: str) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
        vocab_size=len(_vocabulary()), hidden_act=hidden_act, bos_token_id=len(_vocabulary()) - 2,
        eos_token_id=len(_vocabulary()) - 1,
    )  # fmt: skip


def _vocabulary() -> dict[str, int]:
    """CLIP's own first 512 words, one a byte and one a byte that ends a word, and its two ends."""
    letters = sorted(ByteLevel.alphabet())
    return {word: i for i, word in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *CLIP_ENDS])}


def _make_tokenizer(pad: str) -> transformers.CLIPTokenizer:
    return transformers.CLIPTokenizer(
        vocab=_vocabulary(), merges=[], pad_token=pad, bos_token=CLIP_ENDS[0], eos_token=CLIP_ENDS[1],
        unk_token=CLIP_ENDS[1], model_max_length=77,
    )  # fmt: skip


def _publish_tokenizers(folder: Path) -> None:
    """Words and merges as files of their own, as they were before `tokenizer.json`."""
    for made in folder.glob("tokenizer*/tokenizer.json"):
        made.with_name("vocab.json").write_text(json.dumps(_vocabulary()))
        made.with_name("merges.txt").write_text("#version: 0.2\n")
        made.unlink()


def _sharpen(*models: torch.nn.Module) -> None:
    """Larger weights: at the usual small scale all prompts give the same picture."""
    for model in models:
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and ("attn" in name or "embed" in name or "encoder" in name):
                torch.nn.init.normal_(weight, std=0.2)
