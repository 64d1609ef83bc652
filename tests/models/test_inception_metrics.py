"""FID by torchmetrics and the Inception score, beside what is known of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from models.inception_metrics import CHUNK, frechet_inception_distance, inception_score
from models.metrics import NotFiniteError, frechet_distance, measure_moments


def draw(seed: int, count: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


def with_moments(seed: int, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Samples that have exactly these means and standard deviations, and no correlation."""
    drawn = draw(seed, 500, len(mean))
    values, vectors = np.linalg.eigh(np.cov(drawn, rowvar=False))
    white = (drawn - drawn.mean(axis=0)) @ (vectors / np.sqrt(values)) @ vectors.T
    return white * scale + mean


def test_the_distance_of_gaussians_has_a_closed_form():
    rng = np.random.default_rng(0)
    means, scales = rng.normal(size=(2, 6)), rng.uniform(0.1, 3, (2, 6))
    wanted = ((means[0] - means[1]) ** 2).sum() + ((scales[0] - scales[1]) ** 2).sum()
    first, second = (with_moments(seed, means[seed], scales[seed]) for seed in (0, 1))
    assert frechet_inception_distance(first, second) == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 12), st.integers(2, 40))
def test_the_distance_is_finite_and_right_also_with_fewer_samples_than_dimensions(seed, first, second, width):
    real, generated = draw(seed, first, width), draw(seed + 1, second, width) + 1
    found = frechet_inception_distance(real, generated)
    wanted = frechet_distance(*measure_moments(real), *measure_moments(generated))
    assert np.isfinite(found) and found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert frechet_inception_distance(real, real) == pytest.approx(0, abs=1e-4)


def test_the_distance_does_not_depend_on_chunks_or_on_float32_features():
    many = draw(0, CHUNK + 10, 4).astype(np.float32) + 100  # far from zero: float32 sums would lose the spread
    wanted = frechet_distance(*measure_moments(many), *measure_moments(many[: CHUNK - 5] * 1.01))
    found = frechet_inception_distance(many, many[: CHUNK - 5] * np.float32(1.01))
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("first", "second"), [((1, 3), (5, 3)), ((5, 3), (5, 4))])
def test_sets_that_cannot_be_compared_are_refused(first, second):
    with pytest.raises(ValueError, match="both need 2 rows or more of one width"):
        frechet_inception_distance(np.zeros(first), np.zeros(second))


def test_identical_predictions_score_1():
    assert inception_score(np.repeat(draw(0, 1, 7), 40, axis=0), seed=0) == pytest.approx((1, 0))


def test_sure_and_even_predictions_score_the_number_of_classes():
    logits = 100 * np.tile(np.eye(4), (25, 1))
    assert inception_score(logits, seed=0, splits=2)[0] == pytest.approx(4, rel=0.05)


def test_the_score_is_the_exponential_of_the_information_of_each_split():
    logits = draw(1, 30, 5) * 2
    order = torch.randperm(30, generator=torch.Generator().manual_seed(9)).numpy()
    scores = []
    for part in np.split(softmax(logits[order], axis=1), 10):
        scores.append(np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()))
    assert inception_score(logits, seed=9) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))


def test_the_score_depends_on_its_seed_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = inception_score(draw(0, 50, 5), seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert inception_score(draw(0, 50, 5), seed=3) == first != inception_score(draw(0, 50, 5), seed=4)


def test_too_few_samples_for_the_splits_are_refused():
    with pytest.raises(ValueError, match="19 samples: 10 splits need at least 20"):
        inception_score(draw(0, 19, 3), seed=0)


@pytest.mark.parametrize("count", [20, 21, 25, 29, 41])
def test_there_are_as_many_splits_as_asked_for_whatever_the_count(count):
    """Samples each sure of a class of its own: a split scores its size, and ten sizes have a mean of a tenth."""
    mean, deviation = inception_score(1000 * np.eye(count), seed=0)
    sizes = [len(part) for part in np.array_split(np.arange(count), 10)]
    assert mean == pytest.approx(count / 10) and deviation == pytest.approx(np.std(sizes, ddof=1))


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_give_no_number(damage):
    whole, damaged = draw(0, 30, 4), draw(0, 30, 4)
    damaged[7, 2] = damage
    for measure in (
        lambda: frechet_inception_distance(whole, damaged),
        lambda: frechet_inception_distance(damaged, whole),
        lambda: inception_score(damaged, seed=0),
    ):
        with pytest.raises(NotFiniteError, match="not finite .1 of 120.: the pictures or the weights are damaged"):
            measure()
