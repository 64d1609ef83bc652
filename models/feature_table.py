"""What frozen models make of pictures, computed once and read from disk: encoder features and latents.

Each row is a picture and its mirror image. The arrays are NumPy files that are mapped, not loaded, so that training
reads a batch's rows and nothing else, however many there are.

Dimensions: row = pictures; view = the picture, its mirror image; patch, feature = patches of the image encoder and
their width; channel, row, column of a latent; height, width in pixels.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from models import weights
from models.image_encoder import ImageEncoder, count_patches, open_image_encoder
from models.latents import BlockCosineTransform, scale_pictures
from models.variational_latents import VariationalLatents

VIEWS = 2
KEYS_SCHEMA = pa.schema([("film_id", pa.string()), ("frame_index", pa.int64()), ("split", pa.string())])


class FeatureTableError(ValueError):
    """Features cannot be used; the message names what is wrong and the remedy."""


@dataclass(frozen=True)
class FeatureSpace:
    """Which frozen models look at pictures, and at which sizes.

    Attributes:
        image_encoder: `dinov2_small`, or CLIP's name or folder.
        encoder_height_px, encoder_width_px: Pictures are scaled to this for the image encoder.
        patches, feature_dim: Shape of a picture's features.
        vae: Name or folder of SDXL, whose VAE gives the latents; None for a cosine transform of blocks.
        block_px: Side of a latent's position in pixels.
        luma, chroma: Coefficients of that transform.
        latent_channels: Numbers of a latent's position.
        height_px, width_px: Size of whole keyframes.
        crop_px: Side of square pictures.
    """

    image_encoder: str
    encoder_height_px: int
    encoder_width_px: int
    patches: int
    feature_dim: int
    vae: str | None
    block_px: int
    luma: int
    chroma: int
    latent_channels: int
    height_px: int
    width_px: int
    crop_px: int

    def without_places(self) -> "FeatureSpace":
        """The same with the user's own folders left out: they may have been moved between two shards."""
        names = {"image_encoder": self.image_encoder, "vae": self.vae}
        own = {name: "own" for name, value in names.items() if value is not None and value not in weights.TABLE}
        return replace(self, **own)

    def sees_as(self, other: "FeatureSpace") -> bool:
        """Whether another space has the same image encoder looking at the same part of a keyframe."""
        names = ("image_encoder", "encoder_height_px", "encoder_width_px", "height_px", "width_px")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent of a picture."""
        return self.latent_channels, height_px // self.block_px, width_px // self.block_px

    def open_latents(
        self, flattening: float, weights_dir: Path | None, device: str
    ) -> BlockCosineTransform | VariationalLatents:
        """The latents; `flattening` as in `BlockCosineTransform`, which is left where it was built."""
        if self.vae is None:
            return BlockCosineTransform(self.block_px, self.luma, self.chroma, flattening)
        return VariationalLatents(weights.locate(self.vae, weights_dir), device)


class FrozenModels:
    """The image encoder and the latents of a feature space; each is loaded when it is first needed.

    Args:
        space: Which ones.
        weights_dir: Folder of pulled weights; None for the default one.
        device: Where they run.
    """

    def __init__(self, space: FeatureSpace, weights_dir: Path | None = None, device: str = "cpu") -> None:
        self.space, self._weights_dir, self._device = space, weights_dir, device

    @cached_property
    def encoder(self) -> ImageEncoder:
        """The image encoder."""
        return open_image_encoder(self.space.image_encoder, self._weights_dir, self._device)

    @cached_property
    def _latents(self) -> BlockCosineTransform | VariationalLatents:
        latents = self.space.open_latents(0.0, self._weights_dir, self._device)
        return latents if isinstance(latents, VariationalLatents) else latents.to(self._device)

    @torch.no_grad()
    def extract_features(
        self, images: Float[Tensor, "batch 3 height width"], batch: int = 16
    ) -> Float[Tensor, "batch patch feature"]:
        """The encoder's features of RGB pictures in 0..1, all of them scaled to the encoder's size."""
        size = (self.space.encoder_height_px, self.space.encoder_width_px)
        parts = (scale_pictures(part.to(self._device), *size) for part in images.split(batch))
        return torch.cat([self.encoder.encode(part) for part in parts])

    def transform(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channel row column"]:
        """Latents before anything that training measures."""
        return self._latents.transform(images.to(self._device))


def describe_space(
    weights_dir: Path | None, image_encoder: str, vae: str | None, luma: int, chroma: int, block_px: int, **sizes: int
) -> FeatureSpace:
    """A feature space; what depends on the models is read from their weights.

    Args:
        weights_dir: Folder of pulled weights; None for the default one.
        image_encoder, vae, luma, chroma, block_px: As in `FeatureSpace`; `block_px` where there is no VAE.
        sizes: The sizes in pixels of `FeatureSpace`.

    Raises:
        FeatureTableError: A size is no multiple of what the models work in.
        weights.WeightsError: Weights are missing.
    """
    encoder = open_image_encoder(image_encoder, weights_dir)
    channels = luma + 2 * chroma
    if vae is not None:
        latents = VariationalLatents(weights.locate(vae, weights_dir))
        block_px, channels, luma, chroma = latents.downscale, latents.channels, 0, 0
    needed = {"encoder_height_px": encoder.patch_px, "encoder_width_px": encoder.patch_px}
    needed |= dict.fromkeys(("height_px", "width_px", "crop_px"), block_px)
    if wrong := [f"{name} {sizes[name]} ({unit})" for name, unit in needed.items() if sizes[name] % unit]:
        raise FeatureTableError(f"sizes must be multiples of the models' blocks: {', '.join(wrong)}")
    patches = count_patches(sizes["encoder_height_px"], sizes["encoder_width_px"], encoder.patch_px)
    return FeatureSpace(
        image_encoder=image_encoder, patches=patches, feature_dim=encoder.dim, vae=vae, block_px=block_px, luma=luma,
        chroma=chroma, latent_channels=channels, **sizes,
    )  # fmt: skip


class FeatureWriter:
    """Writes `NAME-features.npy` and `NAME-latents.npy`, float16, row after row.

    Args:
        models: What looks at the pictures.
        folder: Where the files go.
        name: `keyframes` or `crops`.
        count: Rows in all.
        size: Height and width of the pictures.
    """

    def __init__(self, models: FrozenModels, folder: Path, name: str, count: int, size: tuple[int, int]) -> None:
        space = self._space = models.space
        shapes = {
            "features": (count, VIEWS, space.patches, space.feature_dim),
            "latents": (count, VIEWS, *space.latent_shape(*size)),
        }
        self._models, self._written = models, 0
        self._arrays = {
            kind: _allocate(folder / f"{name}-{kind}.npy", shape) for kind, shape in shapes.items() if count
        }

    def write(self, images: Float[Tensor, "batch 3 height width"]) -> None:
        """Add RGB pictures in 0..1."""
        views = torch.stack([images, images.flip(3)], dim=1).flatten(0, 1)
        made = {"features": self._models.extract_features(views), "latents": self._models.transform(views)}
        rows = slice(self._written, self._written + len(images))
        for kind, values in made.items():
            self._arrays[kind][rows] = values.unflatten(0, (len(images), VIEWS)).half().cpu().numpy()
        self._written += len(images)

    def leave_out(self) -> None:
        """Leave a row empty; with the split `test` nothing is trained on it."""
        self._written += 1


def _allocate(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A mapped float16 array whose room on the disk is taken at once: a full disk under a map kills the process.

    Raises:
        OSError: There is no room.
    """
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    with path.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return array


def write_space(space: FeatureSpace, keys: Sequence[dict], folder: Path) -> None:
    """Write `keys.parquet` (film, frame index and split of each keyframe), and then `config.json`: all is there."""
    pq.write_table(pa.Table.from_pylist(list(keys), KEYS_SCHEMA), folder / "keys.parquet")
    beside = folder / ".config.json"
    beside.write_text(json.dumps(asdict(space), indent=2) + "\n")
    beside.replace(folder / "config.json")


def read_space(path: Path) -> FeatureSpace:
    """Read what `write_space` wrote."""
    return FeatureSpace(**json.loads(path.read_text()))


def feature_folders(paths: Iterable[Path]) -> list[Path]:
    """The folders in which files of features lie, one a shard, in order."""
    return sorted({path.parent for path in paths})


class FeatureTable(Dataset):
    """Rows of several folders of features, one after the other; maps, not copies.

    An index counts views: row `index // 2`, and its mirror image where the index is odd. A keyframe may have several
    crops.

    Args:
        folders: As `FeatureWriter` and `write_space` left them.
        name: `keyframes` or `crops`.

    Raises:
        FeatureTableError: A folder holds no features, or was made by other models or sizes than the first.
    """

    def __init__(self, folders: Sequence[Path], name: str) -> None:
        spaces = [read_space(folder / "config.json") for folder in folders]
        if not spaces:
            raise FeatureTableError("there are no features: run the features stage first")
        nameless = [space.without_places() for space in spaces]
        if other := next((f for f, space in zip(folders, nameless, strict=True) if space != nameless[0]), None):
            raise FeatureTableError(f"{other.name} was made by other models or sizes: run the features stage again")
        self.space = spaces[-1]
        self._paths, lengths, splits = [], [], []
        for folder in folders:
            pair = (folder / f"{name}-features.npy", folder / f"{name}-latents.npy")
            if pair[0].exists():
                self._paths.append(pair)
                lengths.append(np.load(pair[1], mmap_mode="r").shape[0])
                kept = pq.read_table(folder / "keys.parquet", columns=["split"])["split"].to_numpy()
                splits.append(np.repeat(kept, lengths[-1] // len(kept)))
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._trains = np.concatenate([np.zeros(0, bool), *(kept != "test" for kept in splits)]).astype(bool)
        self._folders = list(folders)
        self._maps: dict[Path, np.ndarray] = {}

    def read_keys(self) -> list[tuple[str, int, str]]:
        """Film, frame index and split of each keyframe, in the order of the rows of `keyframes`."""
        tables = [pq.read_table(folder / "keys.parquet", schema=KEYS_SCHEMA) for folder in self._folders]
        columns = [[value for table in tables for value in table[name].to_pylist()] for name in KEYS_SCHEMA.names]
        return list(zip(*columns, strict=True))

    def __len__(self) -> int:
        return VIEWS * int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Features float16 [patch, feature] and latents float16 [channel, row, column]."""
        features, latents = (self._read(index, kind) for kind in (0, 1))
        return features, latents

    def training_views(self) -> list[int]:
        """Indices of all views but those of the films that are kept out as a whole, pictures before mirror images."""
        rows = np.flatnonzero(self._trains)
        return np.concatenate([VIEWS * rows + view for view in range(VIEWS)]).tolist()

    def features(self, indices: Iterable[int]) -> Float[Tensor, "row patch feature"]:
        """Features of some views, float32."""
        return torch.stack([self._read(index, 0) for index in indices]).float()

    def latents(self, indices: Iterable[int]) -> Float[Tensor, "row channel latent_row column"]:
        """Latents of some views, float32."""
        return torch.stack([self._read(index, 1) for index in indices]).float()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}

    def _read(self, index: int, kind: int) -> Tensor:
        row, view = divmod(index, VIEWS)
        part = int(np.searchsorted(self._ends, row, side="right"))
        path = self._paths[part][kind]
        if path not in self._maps:
            self._maps[path] = np.load(path, mmap_mode="r")
        first = int(self._ends[part - 1]) if part else 0
        return torch.from_numpy(np.array(self._maps[path][row - first, view]))
