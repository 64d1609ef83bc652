"""A long video by Stable Video Diffusion alone: each clip starts from the last frame of the one before.

What the story says after its first frame has no part in it; the story's keyframes are the video's frames at their
times. A clip repeats the frame that it starts from, so that its first frame is left out behind the first clip.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableVideoDiffusionPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from models.diffusers_pipelines import Precision, Progress, Sampling, load_pipeline
from models.latents import cover, read_picture
from models.picture_folder import PictureFolder

FPS = 7
"""Frames a second that the model is asked for; it was trained around it."""
FIRST_GUIDANCE = 1.0
"""Guidance of a clip's first frame, from which it rises to that of its last."""
DECODED_AT_ONCE = 8


@dataclass(frozen=True)
class Place:
    """Where a keyframe is: the frame `offset` of the clip `clip`."""

    clip: int
    offset: int


def load_svd(folder: Path, precision: Precision, device: str | None = None) -> StableVideoDiffusionPipeline:
    """Stable Video Diffusion; its image processor needs no torchvision.

    Raises:
        WeightsError: The folder lacks a part.
    """

    def load_processor() -> CLIPImageProcessorPil:
        return CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor", local_files_only=True)

    what = "Stable Video Diffusion pipeline"
    return load_pipeline(
        what, StableVideoDiffusionPipeline, folder, precision, device, feature_extractor=load_processor
    )


def place_keyframes(keyframes: int, seconds_per_keyframe: float, clip_frames: int) -> list[Place]:
    """The clip and the frame in it of each keyframe's time; of a frame that two clips share, the earlier clip's.

    Args:
        keyframes: Of the story.
        seconds_per_keyframe: Time from one to the next.
        clip_frames: Frames of a clip, at least 2.
    """
    frames = [round(keyframe * seconds_per_keyframe * FPS) for keyframe in range(keyframes)]
    advance = clip_frames - 1
    clips = [max(0, -(-frame // advance) - 1) for frame in frames]
    return [Place(clip, frame - clip * advance) for frame, clip in zip(frames, clips, strict=True)]


def chain_clips(
    pipeline: StableVideoDiffusionPipeline,
    first: bytes,
    places: Sequence[Place],
    sampling: Sampling,
    pictures: PictureFolder,
    progress: Progress,
) -> None:
    """Make clip after clip, as many as the keyframes need, and keep the keyframes.

    Args:
        pipeline: Of `load_svd`.
        first: The picture that the first clip starts from, a JPEG or PNG file of any size.
        places: Of the keyframes.
        sampling: How; guidance rises to its scale over each clip.
        pictures: Where they go; beside them go the last frames of the clips that are done.
        progress: Told after each step.
    """
    clips = places[-1].clip + 1
    start = _fit(first, sampling)
    for clip in range(clips):
        end = pictures.folder / f"clip-{clip:06d}.png"  # lossless; the same whether it was read or just made
        if not end.is_file():

            def tell(step: int, clip: int = clip) -> None:
                progress(clip * sampling.steps + step, clips * sampling.steps, f"clip {clip + 1} of {clips}")

            frames = _sample_clip(pipeline, start, sampling, clip, tell)
            for keyframe, place in enumerate(places):
                if place.clip == clip:
                    pictures.keep(keyframe, frames[place.offset])
            temporary = end.with_suffix(".part")
            _to_image(frames[-1]).save(temporary, "PNG")
            temporary.replace(end)
        with Image.open(end) as image:
            start = image.convert("RGB")
    progress(clips * sampling.steps, clips * sampling.steps, "clips")


def _sample_clip(
    pipeline: StableVideoDiffusionPipeline, start: Image.Image, sampling: Sampling, clip: int, tell: Any
) -> Float[Tensor, "frame 3 height width"]:
    """RGB frames in 0..1, as many as the model was trained on."""

    def step_end(_: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        tell(step + 1)
        return values

    with warnings.catch_warnings():  # the sampler hands tensors to NumPy in a way that NumPy is about to drop
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return pipeline(
            start,
            width=sampling.width_px,
            height=sampling.height_px,
            num_inference_steps=sampling.steps,
            min_guidance_scale=min(FIRST_GUIDANCE, sampling.guidance),
            max_guidance_scale=sampling.guidance,
            fps=FPS,
            decode_chunk_size=DECODED_AT_ONCE,
            generator=sampling.generator(clip),
            callback_on_step_end=step_end,
            output_type="pt",
        ).frames[0]


def _fit(picture: bytes, sampling: Sampling) -> Image.Image:
    """A picture cut around its middle to the video's size."""
    return _to_image(cover(read_picture(picture)[None], sampling.height_px, sampling.width_px)[0])


def _to_image(picture: Float[Tensor, "3 height width"]) -> Image.Image:
    pixels = (picture.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))
