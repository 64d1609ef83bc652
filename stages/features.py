"""What the frozen models make of keyframes, computed once: image-encoder features and latents.

Training and tokenizing read them instead of pictures: at the paper's size the encoder and the VAE would cost more than
the step that follows. One artifact a shard, so that a new film costs its own shard only. Beside whole keyframes, square
crops of them are kept where the first phase of training has no image data set.

Source: section 3.2 and appendix A (frozen CLIP encoder, SDXL's latents, 768x768 and 896x512).
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from models import weights
from stages.errors import ComputationError
from stages.spec import Inputs, Progress, StageConfig, StageSpec, neutral


class FeaturesConfig(StageConfig):
    """Settings of the frozen models and of the sizes of pictures."""

    image_encoder: str = Field(
        "clip_vit_l14", description="dinov2_small, or CLIP's: a name of `moviedreamer weights list` or a local folder"
    )
    encoder_height_px: int = Field(224, description="pictures are scaled to this for the image encoder", gt=0)
    encoder_width_px: int = Field(224, description="pictures are scaled to this for the image encoder", gt=0)
    vae: str | None = Field(
        "sdxl", description="SDXL, whose VAE gives the latents: name or folder; null for cosine transforms of blocks"
    )
    block_px: int = Field(8, description="side of such a block in pixels", gt=0)
    luma: int = Field(28, description="cosine coefficients of brightness kept of each block", gt=0)
    chroma: int = Field(10, description="cosine coefficients kept of each colour difference", gt=0)
    height_px: int = Field(512, description="height of whole keyframes, and of the pictures that are rendered", gt=0)
    width_px: int = Field(896, description="width of whole keyframes, and of the pictures that are rendered", gt=0)
    crop_px: int = Field(768, description="side of the square pictures of the first phase of training", gt=0)
    crops_per_keyframe: int = Field(1, description="square crops taken of each keyframe; 0 with an image set", ge=0)
    seed: int = Field(0, description="of the crops", ge=0)
    batch_pictures: int = neutral(16, "pictures at once", gt=0)

    def is_heavy(self) -> bool:
        """Whether CLIP or SDXL's VAE are among the models."""
        return self.image_encoder != "dinov2_small" or self.vae is not None

    def weights(self) -> tuple[str, ...]:
        """The image encoder, and SDXL for its VAE."""
        return tuple(name for name in (self.image_encoder, self.vae) if name is not None)

    def recipe(self) -> dict[str, Any]:
        """Weights enter by what they hold, not by where they lie."""
        values = super().recipe()
        if self.vae is not None:
            values = {name: value for name, value in values.items() if name not in ("luma", "chroma", "block_px")}
        return weights.without_places(values, *(name for name in ("image_encoder", "vae") if values[name] is not None))

    @model_validator(mode="after")
    def _check_sizes(self) -> "FeaturesConfig":
        for name in ("height_px", "width_px", "crop_px"):
            if getattr(self, name) % self.block_px:
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of block_px {self.block_px}")
        for name in ("encoder_height_px", "encoder_width_px"):
            if getattr(self, name) % 14:
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of 14, the side of a patch")
        return self


SPEC = StageSpec(
    name="features",
    version=1,
    implementation="stages.features:Features",
    inputs=("shards",),
    output="features",
    scope="set",
    cpus=2.0,
    description="image-encoder features and latents of keyframes and of their mirror images",
)


class Features:
    """The job: one shard in; arrays of features and latents, their keys and their feature space out."""

    def __init__(self, config: FeaturesConfig, weights_dir: Path | None = None) -> None:
        from models.feature_table import FrozenModels, describe_space
        from models.pretrained import choose_device

        names = ("image_encoder", "encoder_height_px", "encoder_width_px", "vae", "block_px", "luma", "chroma",
                 "height_px", "width_px", "crop_px")  # fmt: skip
        self._config = config
        space = describe_space(weights_dir, **{name: getattr(config, name) for name in names})
        self._models = FrozenModels(space, weights_dir, choose_device(None))

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Write keyframes-features.npy, keyframes-latents.npy, crops-..., keys.parquet and config.json.

        Returns:
            `keyframes` and `crops`, counted.

        Raises:
            ComputationError: A keyframe cannot be decoded.
        """
        import torch

        from models.feature_table import FeatureWriter, write_space
        from models.latents import cover

        shards, config = inputs["shards"], self._config
        size, crop_size = (config.height_px, config.width_px), (config.crop_px, config.crop_px)
        keys = [
            {name: sample["json"][name] for name in ("film_id", "frame_index", "split")} for sample in _read(shards)
        ]
        crops = config.crops_per_keyframe * len(keys)
        write_space(self._models.space, keys, out)
        whole = FeatureWriter(self._models, out, "keyframes", len(keys), size)
        cropped = FeatureWriter(self._models, out, "crops", crops, crop_size)
        for done, batch in self._batches(shards):
            pictures = [_decode(sample) for sample in batch]
            whole.write(torch.cat([cover(picture[None], *size) for picture in pictures]))
            if crops:
                parts = zip(pictures, batch, strict=True)
                cropped.write(
                    torch.stack([c for picture, sample in parts for c in self._crop(picture, sample["json"])])
                )
            progress(done, len(keys), "features and latents")
        return {"keyframes": len(keys), "crops": crops}

    def _batches(self, shards: list[Path]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Samples in batches, with the count of those handed out."""
        samples, done = _read(shards), 0
        while batch := list(itertools.islice(samples, self._config.batch_pictures)):
            done += len(batch)
            yield done, batch

    def _crop(self, picture: Any, about: dict[str, Any]) -> list[Any]:
        """Crops of a keyframe; which parts are taken depends on the keyframe alone."""
        from models.latents import crop_randomly

        size, rng = (self._config.crop_px, self._config.crop_px), self._rng_of(about)
        return [crop_randomly(picture, *size, rng) for _ in range(self._config.crops_per_keyframe)]

    def _rng_of(self, about: dict[str, Any]) -> np.random.Generator:
        named = f"{self._config.seed} {about['film_id']} {about['frame_index']}"
        return np.random.default_rng(list(hashlib.sha256(named.encode()).digest()))


def _read(shards: list[Path]) -> Iterator[dict[str, Any]]:
    from models.samples import read_samples

    return read_samples(shards)


def _decode(sample: dict[str, Any]) -> Any:
    from PIL import UnidentifiedImageError

    from models.latents import read_picture

    try:
        return read_picture(sample["jpg"])
    except (UnidentifiedImageError, OSError):
        raise ComputationError(
            f"keyframe {sample['__key__']} of the shards cannot be decoded: make the shards again"
        ) from None
