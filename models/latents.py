"""Pictures and their latents: a fixed block cosine transform in the place of a learned variational autoencoder.

No package carries a small VAE, so this profile uses what JPEG uses: square blocks of YCbCr, cosine transform, and
only the lowest frequencies kept. With blocks of 16 pixels a picture of 128x224 becomes channels of 8x14.

Dimensions: batch; height, width in pixels; row = height / block, column = width / block; channel = coefficients.
"""

import io
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from models.pictures import load_picture_file

# Full-range YCbCr of JPEG (JFIF), rows Y, Cb, Cr.
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class BlockCosineTransform(nn.Module):
    """Fixed latents: the lowest-frequency coefficients of each block, brought to about unit scale.

    `decode` is the exact inverse with the coefficients that were left out at zero. The scale of each channel is
    measured once on training pictures by `fit` and is kept in the state dict.

    Args:
        block_px: Side of a block in pixels.
        luma: Coefficients kept of Y, in zigzag order, at most block_px squared.
        chroma: Coefficients kept of Cb and of Cr.
        flattening: 1 brings each channel to unit variance, 0 leaves the natural fall towards high frequencies;
            between them, a channel's share of the loss lies between.

    Raises:
        ValueError: A count is below 1 or above block_px squared.
    """

    def __init__(self, block_px: int, luma: int, chroma: int, flattening: float):
        super().__init__()
        for name, count in (("luma", luma), ("chroma", chroma)):
            if not 1 <= count <= block_px * block_px:
                raise ValueError(f"{name} coefficients are {count}: expected 1 to {block_px * block_px}")
        self.downscale = block_px
        self.channels = luma + 2 * chroma
        self.counts = (luma, chroma, chroma)
        self.flattening = flattening
        self.register_buffer("basis", _cosine_basis(block_px), persistent=False)
        self.register_buffer("to_ycbcr", torch.tensor(YCBCR), persistent=False)
        self.register_buffer("to_rgb", torch.linalg.inv(torch.tensor(YCBCR)), persistent=False)
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("std", torch.ones(self.channels))

    def fit(self, coefficients: Float[Tensor, "batch channel row column"]) -> None:
        """Measure the mean and the scale of each channel on what `transform` made of training pictures."""
        spread = coefficients.std(dim=(0, 2, 3)).clamp(min=1e-3)
        self.mean.copy_(coefficients.mean(dim=(0, 2, 3)))
        flat = spread**self.flattening
        # The mean square over all channels stays 1, as the noise schedule expects.
        self.std.copy_(flat * (spread / flat).square().mean().sqrt())

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channel row column"]:
        """Latents of RGB pictures in 0..1 whose sides are multiples of the block.

        Raises:
            ValueError: A side is not a multiple of the block.
        """
        return self.normalize(self.transform(images))

    def normalize(
        self, coefficients: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch channel row column"]:
        """Bring what `transform` made to about unit scale."""
        return (coefficients - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)

    def decode(self, latents: Float[Tensor, "batch channel row column"]) -> Float[Tensor, "batch 3 height width"]:
        """RGB pictures, clamped to 0..1, of latents."""
        coefficients = latents * self.std.view(1, -1, 1, 1) + self.mean.view(1, -1, 1, 1)
        planes = []
        for part in coefficients.split(self.counts, dim=1):
            padded = functional.pad(part, (0, 0, 0, 0, 0, self.downscale**2 - part.shape[1]))
            blocks = torch.einsum("bkrc,kp->bprc", padded, self.basis)
            planes.append(functional.pixel_shuffle(blocks, self.downscale))
        ycbcr = torch.cat(planes, dim=1)
        return (torch.einsum("yp,bphw->byhw", self.to_rgb, ycbcr) + 0.5).clamp(0, 1)

    def transform(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channel row column"]:
        """The coefficients of RGB pictures in 0..1, of no fixed scale: what does not depend on training.

        Raises:
            ValueError: A side is not a multiple of the block.
        """
        height, width = images.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"picture is {width}x{height}: both sides must be multiples of {self.downscale}")
        ycbcr = torch.einsum("yp,bphw->byhw", self.to_ycbcr, images - 0.5)
        kept = []
        for plane, count in zip(ycbcr.split(1, dim=1), self.counts, strict=True):
            blocks = functional.pixel_unshuffle(plane, self.downscale)
            kept.append(torch.einsum("bprc,kp->bkrc", blocks, self.basis[:count]))
        return torch.cat(kept, dim=1)


def _cosine_basis(block_px: int) -> Float[Tensor, "frequency pixel"]:
    """Rows: the orthonormal two-dimensional cosines in zigzag order; columns: pixels of a block, row by row."""
    position = torch.arange(block_px, dtype=torch.float64)
    table = torch.cos(math.pi * (position + 0.5) * position.view(-1, 1) / block_px) * math.sqrt(2 / block_px)
    table[0] /= math.sqrt(2)
    pairs = sorted(((v, u) for v in range(block_px) for u in range(block_px)), key=lambda p: (p[0] + p[1], p))
    return torch.stack([torch.outer(table[v], table[u]).flatten() for v, u in pairs]).float()


def read_picture(jpeg: bytes) -> Float[Tensor, "3 height width"]:
    """Decode a picture into RGB in 0..1."""
    with Image.open(io.BytesIO(jpeg)) as picture:
        return to_tensor(np.asarray(picture.convert("RGB"))[None])[0]


def load_picture(path: Path) -> Float[Tensor, "3 height width"]:
    """A picture's file in RGB in 0..1; errors of `load_picture_file`."""
    return to_tensor(np.asarray(load_picture_file(path)[1].convert("RGB"))[None])[0]


def cover(
    images: Float[Tensor, "batch 3 source_height source_width"], height_px: int, width_px: int
) -> Float[Tensor, "batch 3 height width"]:
    """Crop pictures around the middle to the shape of a size, and scale them to it.

    Covering rather than letterboxing: no part of a model goes into painting bars, and pictures of films with
    different shapes can follow each other in one movie.
    """
    height, width = images.shape[-2:]
    scale = max(height_px / height, width_px / width)
    # As much is cut off on one side as on the other, so that covering and mirroring can change places.
    top = max(0, round((height - height_px / scale) / 2))
    left = max(0, round((width - width_px / scale) / 2))
    return scale_pictures(images[..., top : height - top, left : width - left], height_px, width_px)


def read_keyframes(jpegs: Iterable[bytes], height_px: int, width_px: int) -> Float[Tensor, "batch 3 height width"]:
    """Pictures of one size, cropped around their middle."""
    return torch.cat([cover(read_picture(jpeg)[None], height_px, width_px) for jpeg in jpegs])


def crop_randomly(
    image: Float[Tensor, "3 source_height source_width"], height_px: int, width_px: int, rng: np.random.Generator
) -> Float[Tensor, "3 height width"]:
    """A random part of a picture in the shape of a size, 60% to 100% as large as fits, scaled to it."""
    height, width = image.shape[-2:]
    scale = min(height / height_px, width / width_px) * rng.uniform(0.6, 1.0)
    kept_height, kept_width = max(1, round(height_px * scale)), max(1, round(width_px * scale))
    top, left = rng.integers(height - kept_height + 1), rng.integers(width - kept_width + 1)
    part = image[None, :, top : top + kept_height, left : left + kept_width]
    return scale_pictures(part, height_px, width_px)[0]


def scale_pictures(
    images: Float[Tensor, "batch 3 source_height source_width"], height_px: int, width_px: int
) -> Float[Tensor, "batch 3 height width"]:
    """Scale pictures without aliasing; their shape may change."""
    size = (height_px, width_px)
    return functional.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def to_tensor(pictures: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    """Pictures as 8-bit RGB arrays to a float tensor in 0..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255


def write_jpeg(image: Float[Tensor, "3 height width"], quality: int = 92) -> bytes:
    """Encode an RGB picture in 0..1 as JPEG."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
