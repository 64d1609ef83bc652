"""The mixture density against torch's own, against its integral, and against its samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from models.gmm import (
    MIN_SHRINKAGE,
    Mixture,
    fit_gaussian,
    guide,
    mixture_of_parameters,
    parameter_count,
    squareplus,
)


def random_mixture(
    components: int, dim: int, batch: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(batch, parameter_count(components, dim), generator=generator, dtype=dtype)
    return mixture_of_parameters(parameters, components)


def as_torch(mixture: Mixture) -> MixtureSameFamily:
    components = Independent(Normal(mixture.locations, mixture.scales), 1)
    return MixtureSameFamily(Categorical(logits=mixture.logits), components)


@settings(max_examples=25, deadline=None)
@given(components=st.integers(1, 7), dim=st.integers(1, 9), seed=st.integers(0, 1000))
def test_density_and_mean_equal_torch(components: int, dim: int, seed: int) -> None:
    mixture = random_mixture(components, dim, seed=seed)
    values = 3 * torch.randn(5, dim, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(values), as_torch(mixture).log_prob(values))
    torch.testing.assert_close(mixture.mean(), as_torch(mixture).mean)
    torch.testing.assert_close(mixture.variance(), as_torch(mixture).variance)


@pytest.mark.parametrize("components", [1, 3, 16])
def test_density_integrates_to_one(components: int) -> None:
    mixture = random_mixture(components, 1, batch=1)
    grid = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    density = mixture.log_prob(grid[:, None]).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-6)


def test_gradients() -> None:
    parameters = torch.randn(3, parameter_count(4, 2), dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, v: mixture_of_parameters(p, 4).log_prob(v), (parameters, values))
    assert torch.autograd.gradcheck(lambda p: mixture_of_parameters(p, 4).mean(), (parameters,))


def test_gradients_in_single_precision_are_those_in_double_and_torchs_own() -> None:
    exact = [tensor.requires_grad_() for tensor in vars(random_mixture(16, 64, batch=8)).values()]
    values = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(as_torch(Mixture(*exact)).log_prob(values).sum(), exact)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        parts = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
        found = torch.autograd.grad(Mixture(*parts).log_prob(values.to(dtype)).sum(), parts)
        for gradient, expected in zip(found, wanted, strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(gradient.double(), expected, atol=tolerance * scale, rtol=tolerance)


def test_one_mixture_takes_many_values_with_gradients() -> None:
    one = random_mixture(3, 2, batch=1)
    parts = [tensor[0].requires_grad_() for tensor in vars(one).values()]
    values = torch.randn(7, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *p: Mixture(*p).log_prob(values), parts)


def test_sample_moments() -> None:
    one = random_mixture(3, 2, batch=1)
    many = Mixture(*(value.expand(200_000, *value.shape[1:]) for value in (one.logits, one.locations, one.scales)))
    samples = many.sample(torch.Generator().manual_seed(0))
    reference = as_torch(one)
    torch.testing.assert_close(samples.mean(0), reference.mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(samples.var(0), reference.variance[0], atol=0.1, rtol=0.02)


def test_temperature_scales_the_deviation() -> None:
    mixture = random_mixture(1, 3, batch=50_000)
    noise = [(mixture.sample(torch.Generator().manual_seed(1), t) - mixture.locations[:, 0]) for t in (0.0, 0.5, 1.0)]
    assert noise[0].abs().max() == 0
    torch.testing.assert_close(2 * noise[1], noise[2])


GRID = torch.linspace(-40, 40, 400_001, dtype=torch.float64)


def one_dimensional(weights: list[float], locations: list[float], scales: list[float]) -> Mixture:
    parts = (torch.tensor(numbers, dtype=torch.float64) for numbers in (weights, locations, scales))
    logits, locations, scales = parts
    return Mixture(logits.log(), locations.unsqueeze(-1), scales.unsqueeze(-1))


def quotient(conditional: Mixture, unconditional: Mixture, weight: float) -> torch.Tensor:
    """p_c^(1 + w) / p_u^w on the grid, normalised by its integral."""
    values = GRID.unsqueeze(-1)
    log_density = (1 + weight) * conditional.log_prob(values) - weight * unconditional.log_prob(values)
    density = (log_density - log_density.max()).exp()
    return density / torch.trapezoid(density, GRID)


@settings(max_examples=40, deadline=None)
@given(
    weight=st.floats(0, 5),
    locations=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    scale=st.floats(0.1, 1),
    wider=st.floats(1, 4),
)
def test_guided_single_gaussians_are_exact(
    weight: float, locations: tuple[float, float], scale: float, wider: float
) -> None:
    conditional = one_dimensional([1.0], [locations[0]], [scale])
    unconditional = one_dimensional([1.0], [locations[1]], [scale * wider])
    guided = guide(conditional, unconditional, weight)
    expected = quotient(conditional, unconditional, weight)
    torch.testing.assert_close(guided.log_prob(GRID[:, None]).exp(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_guided_components_that_lie_apart_are_exact(weight: float) -> None:
    """Their new weights are the integrals of their parts."""
    conditional = one_dimensional([0.5, 0.3, 0.2], [-6.0, 0.0, 7.0], [0.5, 0.3, 0.6])
    unconditional = one_dimensional([1.0], [2.0], [8.0])
    guided = guide(conditional, unconditional, weight)
    expected = quotient(conditional, unconditional, weight)
    torch.testing.assert_close(guided.log_prob(GRID[:, None]).exp(), expected, atol=1e-6, rtol=1e-6)
    assert (guided.logits.exp() - torch.tensor([0.5, 0.3, 0.2])).abs().min() > 0.01


def test_guided_components_that_are_alike_are_exact() -> None:
    conditional = one_dimensional([0.9, 0.1], [1.0, 1.0], [0.5, 0.5])
    unconditional = one_dimensional([1.0], [0.0], [1.5])
    found = guide(conditional, unconditional, 1.5).log_prob(GRID[:, None]).exp()
    torch.testing.assert_close(found, quotient(conditional, unconditional, 1.5), atol=1e-6, rtol=1e-6)


def test_an_unconditional_mixture_counts_by_its_mean_and_variance() -> None:
    conditional, unconditional = random_mixture(4, 3), random_mixture(6, 3, seed=1)
    moments = Mixture(
        torch.zeros(5, 1, dtype=torch.float64),
        unconditional.mean().unsqueeze(-2),
        unconditional.variance().sqrt().unsqueeze(-2),
    )
    found, expected = (tuple(vars(guide(conditional, u, 2.0)).values()) for u in (unconditional, moments))
    torch.testing.assert_close(found, expected)


@settings(max_examples=25, deadline=None)
@given(components=st.integers(1, 7), dim=st.integers(1, 40), weight=st.floats(0, 20), seed=st.integers(0, 1000))
def test_guided_mixtures_are_proper_and_never_wider(components: int, dim: int, weight: float, seed: int) -> None:
    conditional, unconditional = (random_mixture(components, dim, seed=s, dtype=torch.float32) for s in (seed, -seed))
    guided = guide(conditional, unconditional, weight)
    torch.testing.assert_close(guided.logits.logsumexp(-1), torch.zeros(5), atol=1e-5, rtol=0)
    assert (guided.scales > 0).all() and (guided.scales <= conditional.scales * (1 + 1e-6)).all()
    assert torch.isfinite(guided.locations).all()


def test_no_guidance_is_the_conditional() -> None:
    conditional = random_mixture(4, 3)
    guided = guide(conditional, random_mixture(4, 3, seed=1), 0.0)
    assert torch.equal(guided.locations, conditional.locations)
    assert torch.equal(guided.scales, conditional.scales)
    torch.testing.assert_close(guided.logits, conditional.logits.log_softmax(-1))


def test_a_narrow_unconditional_counts_as_wide_as_the_component() -> None:
    """The quotient of these two is no density: it grows without end."""
    guided = guide(one_dimensional([1.0], [1.0], [1.0]), one_dimensional([1.0], [0.5], [0.2]), 3.0)
    assert guided.scales.item() == pytest.approx(1.0)
    assert guided.locations.item() == pytest.approx(1.0 + 3 * 0.5)


def test_negative_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance weight -0.5: expected at least 0"):
        guide(random_mixture(2, 1), random_mixture(2, 1), -0.5)


def test_same_seed_same_sample() -> None:
    mixture = random_mixture(4, 3)
    first, again, other = (mixture.sample(torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_far_values_and_large_parameters_stay_finite() -> None:
    parameters = torch.cat([torch.full((1, 2), 500.0), torch.full((1, 8), -1e6)], -1)
    parameters[:, 1] = -500.0
    log_prob = mixture_of_parameters(parameters, 2, scale_floor=1e-3).log_prob(torch.full((1, 2), 1e3))
    assert torch.isfinite(log_prob).all()


def test_layout_floor_and_precision() -> None:
    # k = 2, d = 1: logits, then location and scale of each component.
    parameters = torch.tensor([0.5, -0.5, 1.0, 0.0, 2.0, -1e9], dtype=torch.bfloat16)
    mixture = mixture_of_parameters(parameters, 2, scale_floor=0.25)
    assert mixture.logits.dtype == torch.float32
    assert mixture.logits.tolist() == [0.5, -0.5]
    assert mixture.locations.tolist() == [[1.0], [2.0]]
    assert mixture.scales.tolist() == [[1.0], [0.25]]


def test_squareplus_is_positive_and_precise_far_left() -> None:
    far = torch.tensor([-1e4, -10.0, 0.0, 10.0], dtype=torch.float32)
    expected = (far.double() + (far.double() ** 2 + 4).sqrt()) / 2
    torch.testing.assert_close(squareplus(far).double(), expected, rtol=1e-4, atol=0)


def test_parameters_that_fit_no_dim_are_refused() -> None:
    with pytest.raises(ValueError, match="12 parameters cannot hold 3 components"):
        mixture_of_parameters(torch.zeros(12), 3)


def test_fitted_gaussian_finds_the_truth() -> None:
    covariance = torch.tensor([[2.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
    truth = MultivariateNormal(torch.tensor([1.0, -3.0], dtype=torch.float64), covariance)
    torch.manual_seed(0)
    gaussian = fit_gaussian(truth.sample((20_000,)))
    torch.testing.assert_close(gaussian.covariance, covariance, atol=0.05, rtol=0)
    samples = truth.sample((20_000,))
    assert gaussian.nll(samples, correlated=True) == pytest.approx(truth.entropy().item() / 2, abs=0.02)
    assert gaussian.nll(samples, correlated=False) > gaussian.nll(samples, correlated=True) + 0.1


def test_shrinkage_falls_with_samples_and_handles_dependent_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(20, 20, generator=generator)
    few, many = (fit_gaussian(torch.randn(n, 20, generator=generator) @ mixing) for n in (15, 5000))
    assert few.shrinkage > 10 * many.shrinkage
    assert math.isfinite(few.nll(torch.zeros(1, 20), correlated=True))
    line = torch.randn(100_000, 1, generator=generator).expand(-1, 3)
    assert fit_gaussian(line).shrinkage == MIN_SHRINKAGE
