"""Latents of SDXL's variational autoencoder. Frozen.

Dimensions: batch; height, width in pixels; row = height / 8, column = width / 8; channel = 4.

Source: section 4.1 of the paper takes SDXL (https://arxiv.org/abs/2307.01952) as the decoder; its VAE belongs to it.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from models.pretrained import load_diffusers


class VariationalLatents:
    """The means of SDXL's latents, at about unit scale. The VAE is loaded when it is first needed.

    Always in float32: SDXL's VAE overflows in half precision.

    Args:
        folder: SDXL in the layout of its makers, with `vae/`.
        device: Where it runs.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        self._loaded: AutoencoderKL | None = None

    @property
    def _vae(self) -> AutoencoderKL:
        if self._loaded is None:
            vae = load_diffusers("SDXL's VAE", self._folder / "vae", AutoencoderKL)
            self._loaded = vae.requires_grad_(False).eval().to(self._device)
        return self._loaded

    @property
    def downscale(self) -> int:
        """Pixels of a latent's position, each way."""
        return 2 ** (len(self._vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Numbers of a position."""
        return int(self._vae.config.latent_channels)

    @torch.no_grad()
    def transform(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channel row column"]:
        """Latents of RGB pictures in 0..1 whose sides are multiples of `downscale`; one picture at a time.

        Raises:
            ValueError: A side is not a multiple.
        """
        height, width = images.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"picture is {width}x{height}: both sides must be multiples of {self.downscale}")
        scaled = 2 * images.to(self._device, torch.float32) - 1
        means = torch.cat([self._vae.encode(image).latent_dist.mode() for image in scaled.split(1)])
        return means * self._vae.config.scaling_factor

    def fit(self, latents: Float[Tensor, "batch channel row column"]) -> None:
        """Nothing: the scale is SDXL's."""

    def normalize(
        self, latents: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch channel row column"]:
        """As they are."""
        return latents

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch channel row column"]) -> Float[Tensor, "batch 3 height width"]:
        """RGB pictures, clamped to 0..1, of latents; one at a time, since a picture's activations are gigabytes."""
        unscaled = latents.to(self._device, torch.float32) / self._vae.config.scaling_factor
        pictures = torch.cat([self._vae.decode(latent).sample for latent in unscaled.split(1)])
        return ((pictures + 1) / 2).clamp(0, 1)
