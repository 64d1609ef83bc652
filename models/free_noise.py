"""A long video from text by FreeNoise on AnimateDiff, with the story's scripts as prompts at their keyframes' times.

The video is sampled as a whole: its noise repeats in shuffled order what one window starts from, the temporal layers
look at windows of 16 frames, 4 apart, and blend them, and prompts pass over into each other between keyframes. Its
latents are kept after each step, so that a killed run goes on from there.

Source: FreeNoise (https://arxiv.org/abs/2310.15169) as diffusers has it; AnimateDiff's model card for the sampler.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.diffusers_pipelines import Precision, Progress, Sampling, decode, load_pipeline, loading
from models.picture_folder import PictureFolder

FPS = 8
"""Frames a second of AnimateDiff's videos."""
WINDOW_FRAMES, WINDOW_STRIDE = 16, 4
MAX_FRAMES = 1024
"""Of a video: all of its frames go through the U-Net together. By the sizes of its layers a frame of 576x320 then holds
about 50 MB in half precision, so that these are about 50 GB, and few accelerators have more than 80."""


class ResumableDDIM(DDIMScheduler):
    """DDIM that leaves out its first `done` steps."""

    done = 0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As DDIM's, without the steps that are done."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps[self.done :]


def load_free_noise(
    folder: Path, motion_adapter: Path, precision: Precision, device: str | None = None
) -> AnimateDiffPipeline:
    """Stable Diffusion 1.5 with AnimateDiff's motion modules, set up for FreeNoise.

    Raises:
        WeightsError: A folder lacks a part.
    """
    dtype = getattr(torch, precision)
    pipeline = load_pipeline(
        f"Stable Diffusion pipeline with the motion modules of {motion_adapter}",
        AnimateDiffPipeline,
        folder,
        precision,
        device,
        motion_adapter=lambda: MotionAdapter.from_pretrained(motion_adapter, **loading(motion_adapter, dtype)),
        feature_extractor=lambda: None,
        image_encoder=lambda: None,
    )
    pipeline.scheduler = ResumableDDIM.from_config(
        pipeline.scheduler.config,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="linspace",
        steps_offset=1,
    )
    pipeline.enable_free_noise(context_length=WINDOW_FRAMES, context_stride=WINDOW_STRIDE)
    pipeline.enable_free_noise_split_inference()
    return pipeline


def place_keyframes(keyframes: int, seconds_per_keyframe: float) -> list[int]:
    """The frame of the video at each keyframe's time.

    Raises:
        ValueError: The video would have more than `MAX_FRAMES` frames.
    """
    places = [round(keyframe * seconds_per_keyframe * FPS) for keyframe in range(keyframes)]
    if places[-1] >= MAX_FRAMES:
        raise ValueError(
            f"{keyframes} keyframes, {seconds_per_keyframe:g} s apart, make a video of {places[-1] + 1} frames, which "
            f"FreeNoise samples at once: expected up to {MAX_FRAMES}"
        )
    return places


def paint_video(
    pipeline: AnimateDiffPipeline,
    prompts: Sequence[str],
    places: Sequence[int],
    sampling: Sampling,
    pictures: PictureFolder,
    progress: Progress,
) -> None:
    """Sample the video, going on from the step that was reached, and keep its frames at the keyframes' times.

    Args:
        pipeline: Of `load_free_noise`.
        prompts: One a keyframe.
        places: The keyframes' frames, from 0, strictly increasing.
        sampling: How.
        pictures: Where they go; beside them go the video's latents.
        progress: Told after each step.
    """
    frames = max(places[-1] + 1, WINDOW_FRAMES)
    path = pictures.folder / "video.safetensors"
    reached = load_file(path) if path.is_file() else {}
    pipeline.scheduler.done = done = int(reached["step"]) if reached else 0

    def step_end(_: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        step += 1 + done
        temporary = path.with_suffix(".part")
        save_file({"step": torch.tensor(step), "latents": values["latents"].contiguous().cpu()}, temporary)
        temporary.replace(path)
        progress(step, sampling.steps, f"step {step} of {sampling.steps}, {frames} frames")
        return values

    video = pipeline(
        prompt=dict(zip(places, prompts, strict=True)),
        num_frames=frames,
        width=sampling.width_px,
        height=sampling.height_px,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=sampling.generator(0),
        latents=reached.get("latents"),
        callback_on_step_end=step_end,
        output_type="latent",
    ).frames
    for keyframe, place in enumerate(places):
        pictures.keep(keyframe, decode(pipeline, video[0, :, place]))
    progress(sampling.steps, sampling.steps, "pictures")
