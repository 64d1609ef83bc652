"""Pictures by SDXL from text alone: a story frame by frame, without any memory of the frames before.

Sampled with DDIM, as StoryDiffusion compares all of its models. Each frame's starting noise follows from the seed and
the frame's number, whatever else is painted with it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from jaxtyping import Float
from torch import Tensor

from models.diffusers_pipelines import Precision, Progress, Sampling, decode, load_pipeline, loading
from models.picture_folder import PictureFolder

StepEnd = Callable[[int, Tensor], Tensor]
"""Called after each step with its number and the latents; what it returns is gone on with."""


def load_sdxl(folder: Path, precision: Precision, device: str | None = None) -> Any:
    """SDXL with a DDIM sampler; its autoencoder in float32, because it overflows in float16.

    Raises:
        WeightsError: The folder lacks a part.
    """
    vae_folder = folder / "vae"
    pipeline = load_pipeline(
        "SDXL pipeline",
        StableDiffusionXLPipeline,
        folder,
        precision,
        device,
        vae=lambda: AutoencoderKL.from_pretrained(vae_folder, **loading(vae_folder, torch.float32)),
        add_watermarker=lambda: False,
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    return pipeline


def paint_frame_by_frame(
    pipeline: Any, prompts: Sequence[str], sampling: Sampling, pictures: PictureFolder, progress: Progress
) -> None:
    """Paint each frame that is not there yet from its own prompt.

    Args:
        pipeline: Of `load_sdxl`.
        prompts: One a frame.
        sampling: How.
        pictures: Where they go.
        progress: Told after each step.
    """
    total = len(prompts) * sampling.steps
    for frame, prompt in enumerate(prompts):
        if frame not in pictures:
            message, before = f"picture {frame + 1} of {len(prompts)}", frame * sampling.steps

            def tell(step: int, latents: Tensor, before: int = before, message: str = message) -> Tensor:
                progress(before + step, total, message)
                return latents

            latents = sample_latents(pipeline, [prompt], [frame], sampling, tell)
            pictures.keep(frame, decode(pipeline, latents[0]))
    progress(total, total, "pictures")


def sample_latents(
    pipeline: Any, prompts: Sequence[str], frames: Sequence[int], sampling: Sampling, step_end: StepEnd
) -> Float[Tensor, "picture channel row column"]:
    """Latents of a batch of pictures, each from a noise of its own.

    Args:
        pipeline: Of `load_sdxl`.
        prompts: One a picture.
        frames: The frames' numbers, from which their noise follows.
        sampling: How.
        step_end: Called after each step, counted from 1.
    """
    scale = pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, sampling.height_px // scale, sampling.width_px // scale)
    noise = torch.stack([torch.randn(shape, generator=sampling.generator(frame)) for frame in frames])
    return pipeline(
        prompt=list(prompts),
        width=sampling.width_px,
        height=sampling.height_px,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        latents=noise.to(pipeline.unet.dtype),
        output_type="latent",
        callback_on_step_end=lambda _, step, time, values: {"latents": step_end(step + 1, values["latents"])},
    ).images
