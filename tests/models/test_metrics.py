import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from models.metrics import (
    NotFiniteError,
    adjacent_cosine,
    clip_score,
    found_within,
    frechet_distance,
    mask_shared,
    measure_moments,
    pairwise_cosine,
    pairwise_distance,
    retrieval_top1,
)


def draw_covariance(rng: np.random.Generator, dim: int) -> np.ndarray:
    factor = rng.normal(size=(dim, dim))
    return factor @ factor.T


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    """tr(A + B - 2 (AB)^1/2) is the squared difference of the standard deviations when both are diagonal."""
    rng = np.random.default_rng(0)
    means, scales = rng.normal(size=(2, 7)), rng.uniform(0.1, 3, (2, 7))
    wanted = ((means[0] - means[1]) ** 2).sum() + ((scales[0] - scales[1]) ** 2).sum()
    assert frechet_distance(means[0], np.diag(scales[0] ** 2), means[1], np.diag(scales[1] ** 2)) == pytest.approx(
        wanted
    )


def test_frechet_distance_equals_the_matrix_square_root_form():
    rng = np.random.default_rng(1)
    mean = np.zeros(5)
    first, second = draw_covariance(rng, 5), draw_covariance(rng, 5)
    wanted = np.trace(first + second - 2 * np.real(sqrtm(first @ second)))
    assert frechet_distance(mean, first, mean, second) == pytest.approx(wanted)


@given(st.integers(0, 10_000), st.integers(2, 12))
def test_frechet_distance_is_symmetric_and_zero_to_itself_also_when_singular(seed, samples):
    rng = np.random.default_rng(seed)
    first, second = (measure_moments(rng.normal(size=(samples, 8))) for _ in range(2))
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), abs=1e-6)
    assert frechet_distance(*first, *first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_invariant_to_rotation():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(50, 4)), rng.normal(size=(60, 4)) @ draw_covariance(rng, 4)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    wanted = frechet_distance(*measure_moments(first), *measure_moments(second))
    assert frechet_distance(*measure_moments(first @ turn), *measure_moments(second @ turn)) == pytest.approx(wanted)


def test_frechet_distance_refuses_two_widths():
    with pytest.raises(ValueError, match="one width"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_moments_are_numpys_own_and_need_two_samples():
    features = np.random.default_rng(3).normal(size=(9, 1))
    mean, covariance = measure_moments(features)
    assert covariance.shape == (1, 1) and covariance[0, 0] == pytest.approx(features.var(ddof=1))
    assert mean[0] == pytest.approx(features.mean())
    with pytest.raises(ValueError, match="at least 2"):
        measure_moments(features[:1])


def test_adjacent_cosine_of_known_angles():
    angles = np.deg2rad([0, 60, 60, 150])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1], [5], [0.1], [2]])
    assert adjacent_cosine(features) == pytest.approx([0.5, 1, 0])
    assert adjacent_cosine(features[:1]).shape == (0,)


def test_cosine_of_a_zero_row_is_zero():
    assert pairwise_cosine(np.zeros((1, 3)), np.ones((2, 3))) == pytest.approx(np.zeros((1, 2)))


def test_pairwise_distance_of_a_known_triangle():
    assert pairwise_distance(np.array([[0.0, 0]]), np.array([[3.0, 4], [0, 0]])) == pytest.approx(np.array([[5, 0]]))


def test_retrieval_counts_own_nearest_and_no_ties():
    gallery = np.eye(4)
    assert retrieval_top1(gallery, gallery) == 1
    assert retrieval_top1(gallery[[0, 1, 3, 2]], gallery) == 0.5
    assert retrieval_top1(np.ones((4, 4)), gallery) == 0, "a collapsed model must not count as a success"


def test_retrieval_refuses_unequal_and_empty_sets():
    with pytest.raises(ValueError, match="same count"):
        retrieval_top1(np.eye(3), np.eye(3)[:2])
    with pytest.raises(ValueError, match="above 0"):
        retrieval_top1(np.zeros((0, 3)), np.zeros((0, 3)))


def test_found_within_looks_at_the_nearest_face_and_reference():
    target = np.array([[0.0, 0], [10, 0]])
    assert found_within(np.array([[50.0, 0], [10, 0.5]]), target, 0.5)
    assert not found_within(np.array([[50.0, 0], [10, 0.5]]), target, 0.49)
    assert not found_within(np.zeros((0, 2)), target, 1) and not found_within(target, np.zeros((0, 2)), 1)


def test_mask_shared_needs_a_common_member():
    assert mask_shared([{1, 2}, {2}, {3}, set(), set()]).tolist() == [True, False, False, False]


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_give_no_number(damage):
    whole = np.random.default_rng(4).normal(size=(5, 3))
    damaged = whole.copy()
    damaged[2, 1] = damage
    mean, covariance = measure_moments(whole)
    for measure in (
        lambda: clip_score(damaged, whole),
        lambda: clip_score(whole, damaged),
        lambda: frechet_distance(damaged[2], covariance, mean, covariance),
        lambda: frechet_distance(mean, covariance, mean, damaged[:3]),
        lambda: measure_moments(damaged),
        lambda: adjacent_cosine(damaged),
    ):
        with pytest.raises(NotFiniteError, match=r"not finite \(1 of \d+\): the pictures or the weights are damaged"):
            measure()
