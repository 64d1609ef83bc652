"""Stable Video Diffusion: a picture to a short clip, under the feature of the same or another picture as its anchor.

Dimensions: frame; height, width in pixels; dim = width of the image encoder's space (1024 upstream).

Source: section 3.5 of the paper; https://arxiv.org/abs/2311.15127, by diffusers, from a folder in the upstream layout.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from models.pretrained import choose_device
from models.weights import WeightsError

transformers_logging.disable_progress_bar()  # a bar for each part would tear the stage's own
_level = transformers_logging.get_verbosity()
transformers_logging.set_verbosity_error()  # the pipeline's file asks for an image processor that needs torchvision
from diffusers import StableVideoDiffusionPipeline  # noqa: E402

transformers_logging.set_verbosity(_level)

Precision = Literal["float32", "float16", "bfloat16"]
PARTS: dict[str, type] = {
    "unet": UNetSpatioTemporalConditionModel,
    "vae": AutoencoderKLTemporalDecoder,
    "image_encoder": CLIPVisionModelWithProjection,
    "scheduler": EulerDiscreteScheduler,
    "feature_extractor": CLIPImageProcessorPil,  # the other one needs torchvision
}
UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class ClipSettings:
    """How a clip is made.

    Attributes:
        frames: Frames of a clip; the first shows the picture it starts from.
        height_px, width_px: The model's size, multiples of 64; pictures are stretched to it.
        steps: Denoising steps.
        fps: Frames a second that the model is told; fewer mean more motion between two frames.
        motion_bucket: How much motion, 0 to 255.
        noise: Standard deviation of the noise added to the picture, whose values are in -1..1.
        min_guidance, max_guidance: Classifier-free guidance of the first and of the last frame.
        decode_frames: Frames that the temporal decoder sees at once.
    """

    frames: int = 25
    height_px: int = 576
    width_px: int = 1024
    steps: int = 25
    fps: int = 7
    motion_bucket: int = 127
    noise: float = 0.02
    min_guidance: float = 1.0
    max_guidance: float = 3.0
    decode_frames: int = 8


class VideoDiffusion:
    """Stable Video Diffusion.

    Args:
        folder: With `unet`, `vae`, `image_encoder`, `scheduler` and `feature_extractor`; files of weights may be the
            `fp16` variant.
        device: Where it runs; None takes an accelerator where there is one.
        precision: Of weights and activations; the makers use float16.
        offload: Keep only the part that is at work on the device: less memory, more time.

    Raises:
        WeightsError: A part is not in the folder, or cannot be read.
    """

    def __init__(
        self, folder: Path, device: str | None = None, precision: Precision = "float32", offload: bool = False
    ) -> None:
        parts = {name: _load_part(folder, name, precision) for name in PARTS}
        self._pipeline = _AnchoredPipeline(**parts)
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.place_on(torch.device(choose_device(device)), offload)

    @torch.inference_mode()
    def embed(self, picture: UInt8[ndarray, "height width 3"]) -> Float32[ndarray, " dim"]:
        """The image encoder's feature of an RGB picture: an anchor, and what tells how far frames drifted."""
        return self._pipeline.embed(Image.fromarray(picture)).float().cpu().numpy()

    def generate(
        self,
        picture: UInt8[ndarray, "height width 3"],
        anchor: Float32[ndarray, " dim"],
        settings: ClipSettings,
        seed: int,
        report: Callable[[int], None] = lambda step: None,
    ) -> UInt8[ndarray, "frame height width 3"]:
        """A clip that starts at a picture.

        With the picture's own feature as the anchor this is what the published pipeline makes.

        Args:
            picture: RGB, of any size.
            anchor: The feature for cross-attention, by `embed`.
            settings: How the clip is made.
            seed: Of all noise, which is drawn on the CPU whatever the device.
            report: Called with the count of finished denoising steps after each.
        """

        def count(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            report(step + 1)
            return values

        self._pipeline.anchor = torch.from_numpy(anchor)
        with _quiet():
            made = self._pipeline(
                Image.fromarray(picture),
                height=settings.height_px,
                width=settings.width_px,
                num_frames=settings.frames,
                num_inference_steps=settings.steps,
                min_guidance_scale=settings.min_guidance,
                max_guidance_scale=settings.max_guidance,
                fps=settings.fps,
                motion_bucket_id=settings.motion_bucket,
                noise_aug_strength=settings.noise,
                decode_chunk_size=settings.decode_frames,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
                callback_on_step_end=count,
            )
        return (made.frames[0] * 255).round().astype(np.uint8)


class _AnchoredPipeline(StableVideoDiffusionPipeline):
    """The published pipeline, with a given feature in the place of the starting picture's own.

    Source: section 3.5 of the paper, last paragraph.
    """

    anchor: Tensor
    _place: torch.device
    _offload: bool

    def place_on(self, device: torch.device, offload: bool) -> None:
        """Say where it runs, and whether parts that are not at work leave."""
        self._place, self._offload = device, offload
        for model in (self.image_encoder, self.unet, self.vae):
            model.to("cpu" if offload else device)

    @property
    def _execution_device(self) -> torch.device:
        return self._place

    def embed(self, image: Image.Image) -> Float[Tensor, " dim"]:
        with self._at_work(self.image_encoder):
            return super()._encode_image(image, self._place, 1, False)[0, 0]

    def _encode_image(self, image: Any, device: Any, num_videos_per_prompt: int, do_classifier_free_guidance: bool):
        anchor = self.anchor.to(device, self.image_encoder.dtype).expand(num_videos_per_prompt, 1, -1)
        return torch.cat([torch.zeros_like(anchor), anchor]) if do_classifier_free_guidance else anchor

    def _encode_vae_image(self, *args: Any, **settings: Any) -> Tensor:
        with self._at_work(self.vae):
            encoded = super()._encode_vae_image(*args, **settings)
        self.unet.to(self._place)  # what comes next
        return encoded

    def decode_latents(self, *args: Any, **settings: Any) -> Tensor:
        self._leave(self.unet)
        with self._at_work(self.vae):
            return super().decode_latents(*args, **settings)

    @contextlib.contextmanager
    def _at_work(self, model: torch.nn.Module) -> Iterator[None]:
        model.to(self._place)
        yield
        self._leave(model)

    def _leave(self, model: torch.nn.Module) -> None:
        if self._offload:
            model.to("cpu")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers says of NumPy's future, and of a decoder that changes its precision for a moment."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(level)


def _load_part(folder: Path, name: str, precision: Precision) -> Any:
    family, place = PARTS[name], folder / name
    if not place.is_dir():
        raise WeightsError(f"Stable Video Diffusion at {folder} has no folder {name}: expected {', '.join(PARTS)}")
    try:
        if not issubclass(family, torch.nn.Module):
            return family.from_pretrained(place, local_files_only=True)
        model, info = family.from_pretrained(place, **_model_settings(family, place, precision))
    except UNREADABLE as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"cannot read {name} of Stable Video Diffusion at {place}: {first}; fetch it again"
        ) from error
    if missing := info["missing_keys"]:
        raise WeightsError(f"{place} lacks weights of its model, {min(missing)} among them: fetch it again")
    return model.eval()


def _model_settings(family: type, place: Path, precision: Precision) -> dict[str, Any]:
    settings = {
        "dtype": getattr(torch, precision),
        "variant": _choose_variant(place, precision),
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if family is not CLIPVisionModelWithProjection:
        settings["low_cpu_mem_usage"] = False  # diffusers' own wish, True, needs accelerate
    return settings


def _choose_variant(place: Path, precision: Precision) -> str | None:
    """The halved files where nothing is lost by them, or where there are no others."""
    names = [path.name for path in place.glob("*.safetensors")]
    halves = [name for name in names if ".fp16." in name or ".fp16-" in name]
    return "fp16" if halves and (precision != "float32" or len(halves) == len(names)) else None
