"""What is measured and kept of reconstructed keyframes.

Dimensions: batch = keyframes; height, width in pixels.
"""

import hashlib
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
from models.latents import read_keyframes, write_jpeg
from models.metrics import choose_evenly, pairwise_cosine
from models.samples import read_samples

RETRIEVAL = (
    "share of keyframes whose reconstruction lies nearest to its own keyframe among the measured ones of its film: "
    "cosine of the patch features ({encoder}) of the whole picture, original and reconstruction both at the "
    "decoder's size (cropped around the middle to its shape, then scaled)"
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
    own = functional.normalize(model.extract_features(keyframes).flatten(1), dim=1).cpu()
    made = functional.normalize(model.extract_features(reconstructions).flatten(1), dim=1).cpu()
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
        "retrieval_definition": RETRIEVAL.format(encoder=model.frozen.encoder.described),
        "feature_cosine": (made * own).sum(dim=1).mean().item(),
        "psnr_db": -10 * (keyframes - reconstructions).square().mean().log10().item(),
        "keyframes": len(films),
        "keyframes_heldout": int((~seen).sum()),
    }


def choose_films(films: Sequence[str], most: int) -> list[int]:
    """Rows of keyframes to measure: all, or those of whole films, in an order of films that means nothing.

    A keyframe is told apart from the others of its film, so a few of each film would be too easy.

    Args:
        films: Film of each row.
        most: Rows wanted; the last film is cut where it would be more.
    """
    if len(films) <= most:
        return list(range(len(films)))
    rows: dict[str, list[int]] = {}
    for row, film in enumerate(films):
        rows.setdefault(film, []).append(row)
    order = sorted(rows, key=lambda film: hashlib.sha256(film.encode()).digest())
    return sorted([row for film in order for row in rows[film]][:most])


def read_chosen(
    shards: Sequence[Path], keys: Sequence[tuple[str, int]], height_px: int, width_px: int
) -> Float[Tensor, "batch 3 height width"]:
    """Keyframes of some films and frame indexes, RGB in 0..1 of one size.

    Raises:
        ValueError: One of them is not in the shards.
    """
    wanted, jpegs = set(keys), {}
    for sample in read_samples(shards):
        key = (sample["json"]["film_id"], sample["json"]["frame_index"])
        if key in wanted:
            jpegs[key] = sample["jpg"]
    if missing := [key for key in keys if key not in jpegs]:
        raise ValueError(f"frame {missing[0][1]} of {missing[0][0]} is not in the shards: make its features again")
    return read_keyframes((jpegs[key] for key in keys), height_px, width_px)


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
    places = choose_evenly(len(keys), count) if count else []
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
