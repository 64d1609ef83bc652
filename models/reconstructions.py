"""What is measured and kept of reconstructed keyframes.

Dimensions: batch = keyframes; height, width in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from models.autoencoder import Autoencoder
from models.latents import write_jpeg
from models.metrics import retrieval_top1

RETRIEVAL = (
    "share of keyframes whose reconstruction lies nearest to its own keyframe among all keyframes of its film: "
    "cosine of DINOv2-S patch features (hidden states after layer 8) of the whole picture, original and "
    "reconstruction both at the decoder's size (cropped around the middle to its shape, then scaled)"
)
SAMPLE_SCHEMA = pa.schema(
    [
        ("film_id", pa.string()),
        ("frame_index", pa.int64()),
        ("original", pa.binary()),
        ("reconstruction", pa.binary()),
    ]
)


def measure_reconstructions(
    model: Autoencoder,
    films: Sequence[str],
    keyframes: Float[Tensor, "batch 3 height width"],
    reconstructions: Float[Tensor, "batch 3 height width"],
) -> dict[str, Any]:
    """How near reconstructions lie to their keyframes, both RGB in 0..1 at the decoder's size.

    Returns:
        Plain JSON values: top-1 retrieval over all and by film, with its definition; mean cosine of the features
        of keyframe and reconstruction; peak signal-to-noise ratio in dB.
    """
    own = functional.normalize(model.extract_features(keyframes).flatten(1), dim=1)
    made = functional.normalize(model.extract_features(reconstructions).flatten(1), dim=1)
    by_film = {}
    for film in sorted(set(films)):
        rows = [row for row, name in enumerate(films) if name == film]
        by_film[film] = retrieval_top1(made[rows].numpy(), own[rows].numpy())
    return {
        "retrieval_top1": sum(by_film[film] for film in films) / len(films),
        "retrieval_top1_by_film": by_film,
        "retrieval_definition": RETRIEVAL,
        "feature_cosine": (made * own).sum(dim=1).mean().item(),
        "psnr_db": -10 * (keyframes - reconstructions).square().mean().log10().item(),
        "keyframes": len(films),
    }


def write_samples(
    path: Path,
    keys: Sequence[tuple[str, int]],
    keyframes: Float[Tensor, "batch 3 height width"],
    reconstructions: Float[Tensor, "batch 3 height width"],
    count: int,
) -> None:
    """Write up to `count` keyframes, spread evenly, and their reconstructions as JPEG in a Parquet file.

    Args:
        path: The file.
        keys: Film and frame index of each keyframe.
        keyframes: RGB in 0..1.
        reconstructions: RGB in 0..1.
        count: How many to keep at most.
    """
    places = np.linspace(0, len(keys) - 1, min(count, len(keys))).round().astype(int) if count else []
    rows = [
        {
            "film_id": keys[place][0],
            "frame_index": keys[place][1],
            "original": write_jpeg(keyframes[place]),
            "reconstruction": write_jpeg(reconstructions[place]),
        }
        for place in places
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA), path)
