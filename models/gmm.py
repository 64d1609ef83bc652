"""The mixture head's density: a Gaussian mixture over one continuous token, its components diagonal.

Dimensions: component = k, dim = d (width of a token), parameter = 2kd + k.

Parameter layout, a token: `[k logits | k x (d locations, d scales)]`. The scale (a standard deviation) is
`squareplus(raw)`, floored.

Source: the paper, section 3.3 and appendix A, equation 6 (2kd + k parameters); layout and squareplus as in GIVT.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SCALE_FLOOR = 1e-6
"""GIVT's smallest standard deviation."""

MIN_SHRINKAGE = 1e-3
"""Of the correlations of a fitted Gaussian."""

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Mixture:
    """A batch of mixtures.

    Attributes:
        logits: Unnormalised log weights of the components.
        locations: Means of the components.
        scales: Standard deviations of the components, positive.
    """

    logits: Float[Tensor, "*batch component"]
    locations: Float[Tensor, "*batch component dim"]
    scales: Float[Tensor, "*batch component dim"]

    def __getitem__(self, chosen: slice) -> "Mixture":
        """Some of the batch."""
        return Mixture(self.logits[chosen], self.locations[chosen], self.scales[chosen])

    def log_prob(self, values: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Log density, in nats a token.

        Source: the paper, equation 6.
        """
        shape = torch.broadcast_shapes(self.logits.shape[:-1], values.shape[:-1])
        spread = [part.expand(*shape, *part.shape[len(self.logits.shape) - 1 :]) for part in vars(self).values()]
        return _LogProb.apply(*spread, values.expand(*shape, values.shape[-1]))

    def mean(self) -> Float[Tensor, "*batch dim"]:
        """The mixture's mean: the "predicted token" of the l1 and l2 losses."""
        return (self.logits.softmax(-1).unsqueeze(-1) * self.locations).sum(-2)

    def variance(self) -> Float[Tensor, "*batch dim"]:
        """The mixture's variance in each dimension."""
        squares = self.scales.square() + (self.locations - self.mean().unsqueeze(-2)).square()
        return (self.logits.softmax(-1).unsqueeze(-1) * squares).sum(-2)

    def sample(self, generator: torch.Generator, temperature: float = 1.0) -> Float[Tensor, "*batch dim"]:
        """Draw one token from each mixture.

        Args:
            generator: The source of randomness; on the device of the mixture.
            temperature: Factor of the standard deviations, at least 0; 0 gives the drawn component's location.
        """
        weights = self.logits.softmax(-1)
        drawn = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1, generator=generator)
        index = drawn.reshape(*weights.shape[:-1], 1, 1).expand(*weights.shape[:-1], 1, self.locations.shape[-1])
        location = self.locations.gather(-2, index).squeeze(-2)
        scale = self.scales.gather(-2, index).squeeze(-2)
        noise = torch.randn(location.shape, generator=generator, dtype=location.dtype, device=location.device)
        return location + temperature * scale * noise


class _LogProb(torch.autograd.Function):
    """The mixture's log density with a backward pass of its own.

    Autograd would keep a tensor of the locations' size for each step of the formula, and go through all of them twice.
    Here one is kept, the standardized differences, from which all gradients follow.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, locations: Tensor, scales: Tensor, values: Tensor) -> Tensor:
        work = scales.log()
        constant = work.sum(-1) + _HALF_LOG_TWO_PI * values.shape[-1]
        standardized = torch.sub(values.unsqueeze(-2), locations, out=work).div_(scales)
        squares = torch.linalg.vector_norm(standardized, dim=-1).square()
        log_joint = logits.log_softmax(-1) - 0.5 * squares - constant
        ctx.save_for_backward(standardized, scales, logits, log_joint)
        return torch.logsumexp(log_joint, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        standardized, scales, logits, log_joint = ctx.saved_tensors
        share = log_joint.softmax(-1) * slope.unsqueeze(-1)  # of each component in the density
        to_logits = share - logits.softmax(-1) * slope.unsqueeze(-1)
        share = share.unsqueeze(-1)
        to_locations = (standardized / scales).mul_(share)
        to_scales = (to_locations * standardized).addcdiv_(share.expand_as(scales), scales, value=-1)
        return to_logits, to_locations, to_scales, -to_locations.sum(-2)


def guide(conditional: Mixture, unconditional: Mixture, weight: float) -> Mixture:
    """Classifier-free guidance between densities: a mixture near p_c^(1 + w) / p_u^w, normalised, in closed form.

    A power of a mixture is no mixture, so two things stand in for what has no closed form. The unconditional density is
    taken as one Gaussian of its mean and its variances. The conditional one is raised component by component, as if
    its components did not overlap (right as well where they are all alike): component j becomes the Gaussian
    N_j^(1 + w) / N_u^w / Z_j, and its weight pi_j becomes pi_j^(1 + w) Z_j, normalised. In one dimension, with
    r = (s_j / s_u)^2 and g = 1 + w - w r,

        scale = s_j / sqrt(g)        location = m_j + (m_j - m_u) w r / g
        log Z_j = (m_j - m_u)^2 w (1 + w) / (2 g s_u^2) - (w log r + log g) / 2

    and Z_j of several dimensions is their product. For two single Gaussians this is exact.

    Where the unconditional scale is smaller than the component's, the quotient is wider than the component, and from
    s_u^2 <= s_j^2 w / (1 + w) on it is no density. There s_u is taken to be s_j: the location still moves away from the
    unconditional one, by w times the difference, and the scale stays. So no scale ever grows.

    Args:
        conditional: Predicted with what the sample should follow.
        unconditional: Predicted without; of the same batch, with any number of components.
        weight: w, at least 0; 0 gives the conditional mixture.

    Returns:
        As many components as the conditional has; its logits are log weights that sum to 1.

    Raises:
        ValueError: The weight is negative.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022; between densities as in GIVT, which samples
    their quotient by rejection.
    """
    if weight < 0:
        raise ValueError(f"guidance weight {weight}: expected at least 0")
    mean, variance = unconditional.mean().unsqueeze(-2), unconditional.variance().unsqueeze(-2)
    variance = torch.maximum(variance, conditional.scales.square())
    ratio = conditional.scales.square() / variance
    gain = 1 + weight - weight * ratio
    difference = conditional.locations - mean
    log_constants = difference.square() * weight * (1 + weight) / (gain * variance) - weight * ratio.log() - gain.log()
    logits = (1 + weight) * conditional.logits.log_softmax(-1) + 0.5 * log_constants.sum(-1)
    locations = conditional.locations + difference * weight * ratio / gain
    return Mixture(logits.log_softmax(-1), locations, conditional.scales / gain.sqrt())


def parameter_count(components: int, dim: int) -> int:
    """Numbers that describe one mixture: 2kd + k."""
    return components * (2 * dim + 1)


def mixture_of_parameters(
    parameters: Float[Tensor, "*batch parameter"], components: int, scale_floor: float = SCALE_FLOOR
) -> Mixture:
    """Read mixtures from a layer's output. Half-precision inputs are taken to float32 first.

    Args:
        parameters: In the layout of this module.
        components: k.
        scale_floor: Smallest standard deviation.

    Raises:
        ValueError: The number of parameters is not k (2d + 1) for any d.
    """
    width = parameters.shape[-1]
    if width % components or width // components < 3 or (width // components) % 2 == 0:
        raise ValueError(f"{width} parameters cannot hold {components} components: expected k * (2 * d + 1)")
    parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
    logits, rest = parameters.split([components, width - components], -1)
    locations, raw_scales = rest.unflatten(-1, (components, 2, -1)).unbind(-2)
    return Mixture(logits, locations, squareplus(raw_scales).clamp(min=scale_floor))


def squareplus(raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A smooth map to the positive numbers, 1 at 0.

    Source: GIVT; `(x + sqrt(x^2 + 4)) / 2`, written for negative x without cancellation.
    """
    root = torch.sqrt(raw.square() + 4)
    return torch.where(raw >= 0, 0.5 * (raw + root), 2 / (root - raw))


@dataclass(frozen=True)
class Gaussian:
    """One Gaussian fitted to samples, in float64.

    Attributes:
        mean: Of the samples.
        std: Standard deviation of each number.
        covariance: With the correlations shrunk towards none.
        shrinkage: Share of "no correlation" in it, 0 to 1.
    """

    mean: Float[Tensor, " number"]
    std: Float[Tensor, " number"]
    covariance: Float[Tensor, "number number"]
    shrinkage: float

    def nll(self, samples: Float[Tensor, "sample number"], correlated: bool) -> float:
        """Mean negative log density in nats a number, with or without the correlations."""
        covariance = self.covariance if correlated else torch.diag(self.std.square())
        density = torch.distributions.MultivariateNormal(self.mean, covariance).log_prob(samples.double())
        return float(-density.mean() / len(self.mean))


def fit_gaussian(samples: Float[Tensor, "sample number"]) -> Gaussian:
    """Fit a Gaussian to samples that may be fewer than the numbers in one.

    The correlations are shrunk by Ledoit and Wolf's estimate of the best share.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
    """
    samples = samples.double()
    mean, std = samples.mean(0), samples.std(0, correction=0).clamp(min=1e-6)
    values = (samples - mean) / std
    count, numbers = values.shape
    correlation = values.T @ values / count
    target = torch.eye(numbers, dtype=torch.float64)
    distance = (correlation - target).square().sum()
    spread = (values.square().T @ values.square() / count - correlation.square()).sum() / count
    # At least a little, so that numbers which determine each other still have a density.
    shrinkage = float((spread / distance).clamp(MIN_SHRINKAGE, 1)) if distance > 0 else 1.0
    covariance = (shrinkage * target + (1 - shrinkage) * correlation) * torch.outer(std, std)
    return Gaussian(mean, std, covariance, shrinkage)
