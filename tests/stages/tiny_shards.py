"""Shards of a few tiny keyframes, and their features."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from stages.features import Features, FeaturesConfig
from stages.spec import no_progress

SMALL = {
    "image_encoder": "dinov2_small",
    "encoder_height_px": 28,
    "encoder_width_px": 56,
    "vae": None,
    "luma": 6,
    "chroma": 3,
    "height_px": 16,
    "width_px": 32,
    "crop_px": 16,
}


def write_shard(
    path: Path,
    split: str = "train",
    films: tuple[int, ...] = (0, 1),
    splits: tuple[str, ...] | None = None,
    damaged: int | None = None,
) -> Path:
    """A shard of films with two keyframes each; the keyframe at place `damaged` is no picture."""
    with path.open("wb") as stream, webdataset.TarWriter(stream, mtime=0) as shard:
        for place in range(2 * len(films)):
            film, frame = films[place // 2], 30 * (place % 2)
            rng = np.random.default_rng(2 * film + place % 2)
            picture = Image.fromarray(rng.integers(0, 255, (3, 5, 3), np.uint8))
            jpeg = io.BytesIO()
            picture.resize((40, 24), Image.Resampling.BICUBIC).save(jpeg, "JPEG")
            about = {"film_id": f"film{film}", "frame_index": frame, "faces": []}
            about["split"] = splits[place] if splits else split
            data = b"no picture" if place == damaged else jpeg.getvalue()
            shard.write({"__key__": f"film{film}-{frame:08d}", "jpg": data, "json": json.dumps(about).encode()})
    return path


def write_features(shards: list[Path], folder: Path, **settings: Any) -> list[Path]:
    """What the features stage writes of shards."""
    folder.mkdir(parents=True, exist_ok=True)
    Features(FeaturesConfig(**{**SMALL, **settings}))({"shards": shards}, folder, folder, no_progress)
    return sorted(folder.glob("*.*"))
