"""How Stable Video Diffusion sets keyframes in motion: settings of the animate stage."""

import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models import weights
from stages.spec import neutral

if TYPE_CHECKING:
    from models.video_diffusion import ClipSettings, VideoDiffusion


class SvdConfig(BaseModel):
    """The video model of a movie, and how its clips are made. Where the paper is silent, its makers' values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = Field("svd_xt", description="Name of `weights list` or local folder in the upstream layout.")
    frames: int = Field(25, ge=2, le=128, description="Frames of one clip; SVD-XT was trained for 25.")
    height_px: int = Field(576, ge=64, multiple_of=64, description="The model's height.")
    width_px: int = Field(1024, ge=64, multiple_of=64, description="The model's width; pictures are stretched to both.")
    steps: int = Field(25, ge=1, description="Denoising steps of a clip.")
    fps: int = Field(
        7,
        ge=1,
        le=60,
        description="Frames of the model in a second of movie, which it is also told: more, less motion.",
    )
    motion_bucket: int = Field(127, ge=0, le=255, description="How much motion.")
    noise: float = Field(0.02, ge=0, le=1, description="Standard deviation of the noise added to a clip's picture.")
    min_guidance: float = Field(1.0, ge=1, description="Classifier-free guidance of a clip's first frame.")
    max_guidance: float = Field(3.0, ge=1, description="Classifier-free guidance of a clip's last frame.")
    reanchor_below: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Cosine between a clip's last frame and its keyframe below which the next clip starts at the "
        "keyframe again, after a cut; null: never, as in the paper.",
    )
    precision: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="Of the model; float16 is very slow on a CPU."
    )
    decode_frames: int = Field(8, ge=1, description="Frames decoded together: more, steadier, and more memory.")
    seed: int = Field(0, ge=0, description="Of the first clip; each further one takes the next.")
    offload: bool = neutral(False, "Keep only the part at work on the accelerator: less memory, more time.")

    def recipe(self) -> dict[str, Any]:
        """What changes results; the weights enter by what they hold, not by where they lie."""
        return self.model_dump(mode="json", exclude={"weights", "offload"})

    def open(self, weights_dir: Path | None) -> "VideoDiffusion":
        """Load it."""
        from models.video_diffusion import VideoDiffusion

        folder = weights.locate(self.weights, weights_dir)
        return VideoDiffusion(folder, precision=self.precision, offload=self.offload)

    def clip_settings(self) -> "ClipSettings":
        """The fields of the same names."""
        from models.video_diffusion import ClipSettings

        return ClipSettings(**{field.name: getattr(self, field.name) for field in fields(ClipSettings)})

    def clips_in(self, seconds: float) -> int:
        """Clips that are chained at most to fill a time: each adds a frame less than it has."""
        return max(1, math.ceil(seconds * self.fps / (self.frames - 1)))

    @model_validator(mode="after")
    def _require_growing_guidance(self) -> "SvdConfig":
        if self.max_guidance < self.min_guidance:
            raise ValueError(
                f"max_guidance {self.max_guidance} is less than min_guidance {self.min_guidance}: guidance grows from "
                "a clip's first frame to its last"
            )
        return self
