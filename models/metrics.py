"""Measures of generated pictures, as plain functions of features.

Dimensions: sample = one picture or face; dim = width of its feature.
"""

import itertools

import numpy as np
from jaxtyping import Bool, Float

Features = Float[np.ndarray, "sample dim"]


class NotFiniteError(ValueError):
    """Features hold NaN or infinity, of which no number can be told."""


def check_finite(*features: Float[np.ndarray, "..."]) -> None:
    """Refuse values of which a comparison would make a good number: `max(0.0, nan)` is 0, the best distance.

    Raises:
        NotFiniteError: A value is NaN or infinite.
    """
    for values in features:
        if damaged := np.size(values) - int(np.isfinite(values).sum()):
            raise NotFiniteError(
                f"the features hold values that are not finite ({damaged} of {np.size(values)}): the pictures or the "
                "weights are damaged; make the pictures again, or pull the weights again"
            )


def normalize(features: Features) -> Float[np.ndarray, "sample dim"]:
    """Scale each row to length 1; a row of zeros stays zeros."""
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def pairwise_cosine(first: Features, second: Float[np.ndarray, "other dim"]) -> Float[np.ndarray, "sample other"]:
    """Cosine (-1..1) of every row of `first` with every row of `second`."""
    return normalize(first) @ normalize(second).T


def pairwise_distance(first: Features, second: Float[np.ndarray, "other dim"]) -> Float[np.ndarray, "sample other"]:
    """Euclidean distance of every row of `first` to every row of `second`."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return np.linalg.norm(first[:, None] - second[None], axis=-1)


def adjacent_cosine(features: Features) -> Float[np.ndarray, " pair"]:
    """Cosine (-1..1) of each row with the next one; one value fewer than rows.

    Source: section 4.2 of the paper: the ground of ST (over pairs that share a character) and of CLIP-sim (over all).

    Raises:
        NotFiniteError: A value is NaN or infinite.
    """
    check_finite(features)
    unit = normalize(features)
    return (unit[:-1] * unit[1:]).sum(axis=-1)


def clip_score(pictures: Features, texts: Features) -> float:
    """CLIP score: 100 times the mean cosine of each picture with its own text, at least 0 (0..100).

    Source: https://arxiv.org/abs/2104.08718 in the scale of torchmetrics' `CLIPScore`.

    Raises:
        ValueError: The counts differ, or there is no picture.
        NotFiniteError: A value is NaN or infinite.
    """
    if len(pictures) != len(texts) or not len(pictures):
        raise ValueError(f"{len(pictures)} pictures and {len(texts)} texts: both need the same count, above 0")
    check_finite(pictures, texts)
    return max(0.0, float(100 * (normalize(pictures) * normalize(texts)).sum(axis=-1).mean()))


def retrieval_top1(queries: Features, gallery: Features) -> float:
    """Share (0..1) of queries whose nearest row of the gallery, by cosine, has their own index.

    An own match that ties with another counts as a miss.

    Raises:
        ValueError: The counts differ, or there is nothing to retrieve.
    """
    if len(queries) != len(gallery) or not len(queries):
        raise ValueError(f"{len(queries)} queries and {len(gallery)} gallery rows: both need the same count, above 0")
    cosines = pairwise_cosine(queries, gallery)
    own = np.diagonal(cosines)
    others = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines).max(axis=1)
    return float(np.mean(own > others + 1e-12))


def found_within(faces: Features, target: Float[np.ndarray, "reference dim"], threshold: float) -> bool:
    """Whether any face lies within `threshold` (Euclidean) of any reference face of the target."""
    if not len(faces) or not len(target):
        return False
    return bool((pairwise_distance(faces, target) <= threshold).any())


def measure_moments(features: Features) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim dim"]]:
    """Mean and unbiased covariance of the rows.

    Raises:
        ValueError: There are fewer than two rows.
        NotFiniteError: A value is NaN or infinite.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} samples: a covariance needs at least 2")
    check_finite(features)
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(
    first_mean: Float[np.ndarray, " dim"],
    first_covariance: Float[np.ndarray, "dim dim"],
    second_mean: Float[np.ndarray, " dim"],
    second_covariance: Float[np.ndarray, "dim dim"],
) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2). The product in the root is symmetric and positive, so its
    eigenvalues are real also where the covariances are singular, as with fewer samples than dimensions.

    Source: the definition of FID, https://arxiv.org/abs/1706.08500, without its Inception features.

    Raises:
        ValueError: The widths differ.
        NotFiniteError: A value is NaN or infinite.
    """
    if first_mean.shape != second_mean.shape:
        raise ValueError(f"features are {first_mean.shape} and {second_mean.shape} wide: both must have one width")
    check_finite(first_mean, first_covariance, second_mean, second_covariance)
    values, vectors = np.linalg.eigh(first_covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second_covariance @ root)
    overlap = np.sqrt(np.clip(product, 0, None)).sum()
    shift = first_mean - second_mean
    distance = shift @ shift + np.trace(first_covariance) + np.trace(second_covariance) - 2 * overlap
    return max(0.0, float(distance))


def mask_shared(groups: list[set]) -> Bool[np.ndarray, " pair"]:
    """For each set and the next: whether they share a member."""
    return np.array([bool(a & b) for a, b in itertools.pairwise(groups)], dtype=bool)


def choose_evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, spread evenly."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist() if count else []
