"""The sizes of a diffusion autoencoder: what its compressor and its decoders are built from."""

from dataclasses import dataclass, fields
from typing import Any

from models.diffusion import Prediction
from models.feature_table import FeatureSpace


@dataclass(frozen=True)
class Architecture:
    """Sizes of a diffusion autoencoder, kept beside its weights.

    Attributes:
        space: The frozen models in front of it, and the sizes of pictures.
        tokens, token_dim: The compressed picture.
        compressor_width, compressor_heads: Its transformer blocks.
        pretrained: Name or folder of SDXL, whose UNet the decoder is; None for a small UNet of the sizes below.
        flattening: Of latents that are cosine transforms; see `BlockCosineTransform`.
        channels: Width of the small UNet at each resolution, finest first, each half the one before.
        layers: Residual blocks at each resolution.
        cross_dim: Width of the cross-attention context.
        heads: Attention heads.
        norm_groups: Groups of its normalisation.
        draft_components, draft_width: Sizes of a `Draft`; 0 components for none.
        timesteps, prediction: The noise schedule.
    """

    space: FeatureSpace
    tokens: int
    token_dim: int
    compressor_width: int
    compressor_heads: int
    pretrained: str | None
    flattening: float
    channels: tuple[int, ...]
    layers: int
    cross_dim: int
    heads: int
    norm_groups: int
    draft_components: int
    draft_width: int
    timesteps: int
    prediction: Prediction

    @classmethod
    def from_settings(cls, settings: Any, space: FeatureSpace) -> "Architecture":
        """Take the fields of the same names from a settings object."""
        values = {field.name: getattr(settings, field.name) for field in fields(cls) if field.name != "space"}
        return cls(**{**values, "space": space, "channels": tuple(values["channels"])})

    @property
    def height_px(self) -> int:
        """Height of the pictures it gives."""
        return self.space.height_px

    @property
    def width_px(self) -> int:
        """Width of the pictures it gives."""
        return self.space.width_px
