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
from models.metrics import pairwise_cosine

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
    trained: Sequence[bool],
    keyframes: Float[Tensor, "batch 3 height width"],
    reconstructions: Float[Tensor, "batch 3 height width"],
) -> dict[str, Any]:
    """How near reconstructions lie to their keyframes, both RGB in 0..1 at the decoder's size.

    Args:
        model: Gives the features.
        films: Film of each keyframe.
        trained: Whether the model was trained on the keyframe.
        keyframes: The originals.
        reconstructions: In the same order.

    Returns:
        Plain JSON values: top-1 retrieval over all, by film, and apart for keyframes that were trained on and those
        held out (null where there are none), with its definition; mean cosine of the features of keyframe and
        reconstruction; peak signal-to-noise ratio in dB.
    """
    own = functional.normalize(model.extract_features(keyframes).flatten(1), dim=1)
    made = functional.normalize(model.extract_features(reconstructions).flatten(1), dim=1)
    hits = np.zeros(len(films), dtype=bool)
    for film in set(films):
        rows = [row for row, name in enumerate(films) if name == film]
        cosines = pairwise_cosine(made[rows].numpy(), own[rows].numpy())
        others = np.where(np.eye(len(rows), dtype=bool), -np.inf, cosines).max(axis=1)
        hits[rows] = np.diagonal(cosines) > others + 1e-12  # a tie with another keyframe is a miss
    seen = np.array(trained, dtype=bool)
    return {
        "retrieval_top1": hits.mean().item(),
        "retrieval_top1_train": hits[seen].mean().item() if seen.any() else None,
        "retrieval_top1_heldout": hits[~seen].mean().item() if not seen.all() else None,
        "retrieval_top1_by_film": {film: hits[np.array(films) == film].mean().item() for film in sorted(set(films))},
        "retrieval_definition": RETRIEVAL,
        "feature_cosine": (made * own).sum(dim=1).mean().item(),
        "psnr_db": -10 * (keyframes - reconstructions).square().mean().log10().item(),
        "keyframes": len(films),
        "keyframes_heldout": int((~seen).sum()),
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
