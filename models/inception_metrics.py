"""FID by torchmetrics and the Inception score, of features and logits that were computed before.

Dimensions: sample = one picture; dim = width of its features; label = classes.

Source: https://arxiv.org/abs/1706.08500 (FID), https://arxiv.org/abs/1606.03498 (Inception score).
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from models.metrics import check_finite

CHUNK = 4096
SPLITS = 10
"""Of the Inception score, as it was first computed."""


class _Given(nn.Module):
    """Stands where torchmetrics has its feature extractor: what comes in are the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_inception_distance(real: Float[ndarray, "sample dim"], generated: Float[ndarray, "other dim"]) -> float:
    """Frechet distance of two sets of features, in float64.

    The distance does not change when both sets are turned together. Where there are fewer samples than features, they
    are turned into the few dimensions in which they differ: torchmetrics takes the eigenvalues of a matrix as wide as
    the features, which for 2048 of them takes seconds.

    Raises:
        ValueError: The widths differ, or a set has fewer than two rows.
        NotFiniteError: A value is NaN or infinite.
    """
    if real.shape[1] != generated.shape[1] or min(len(real), len(generated)) < 2:
        raise ValueError(f"features are {real.shape} and {generated.shape}: both need 2 rows or more of one width")
    check_finite(real, generated)
    center = np.mean(real, axis=0, dtype=np.float64)
    spanned = None
    if len(real) + len(generated) < len(center):
        spanned = np.linalg.qr((np.concatenate([real, generated]) - center).T).Q
    metric = FrechetInceptionDistance(feature=_Given(len(center) if spanned is None else spanned.shape[1]))
    for features, is_real in ((real, True), (generated, False)):
        for start in range(0, len(features), CHUNK):
            chunk = features[start : start + CHUNK] - center
            metric.update(torch.from_numpy(chunk if spanned is None else chunk @ spanned), real=is_real)
    return max(0.0, metric.compute().item())


def inception_score(logits: Float[ndarray, "sample label"], seed: int, splits: int = SPLITS) -> tuple[float, float]:
    """Mean and unbiased standard deviation of the score over shuffled splits, in float64.

    The sizes of the splits differ by one at most, so that there are as many as asked for whatever the count: torch's
    chunks, which torchmetrics takes, are 7 of 3 for 21 samples in 10 splits.

    Args:
        logits: Of a classifier, before the softmax.
        seed: Of the shuffle.
        splits: Among which the samples are dealt.

    Raises:
        ValueError: A split would have fewer than two samples: its score is 1 whatever they show.
        NotFiniteError: A value is NaN or infinite.
    """
    if len(logits) < 2 * splits:
        raise ValueError(f"{len(logits)} samples: {splits} splits need at least {2 * splits}")
    check_finite(logits)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    shuffled = torch.from_numpy(np.asarray(logits, np.float64))[order].log_softmax(dim=1)
    scores = torch.stack([_score_split(split) for split in torch.tensor_split(shuffled, splits)])
    return scores.mean().item(), scores.std().item()


def _score_split(logs: Float[Tensor, "sample label"]) -> Float[Tensor, ""]:
    """Exponential of the mean divergence of a sample's label probabilities from their mean."""
    mean = logs.logsumexp(dim=0) - math.log(len(logs))
    return (logs.exp() * (logs - mean)).sum(dim=1).mean().exp()
