"""Diffusion as the image decoder uses it: noise schedule, loss of equation 1, sampling.

Dimensions: batch; channel, row, column of a latent.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from models.samplers import Sampler

Prediction = Literal["epsilon", "v_prediction"]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Called as `denoiser(noisy latents, timesteps)`; answers with what the schedule's prediction type says."""


class NoiseSchedule:
    """A DDPM schedule for training, which schedulers of other kinds follow in sampling.

    With `v_prediction` the last timestep is pure noise (zero terminal signal-to-noise ratio), so that dark and
    bright frames come out as such; with `epsilon` that timestep would have nothing to learn from.

    Source: equation 1; https://arxiv.org/abs/2305.08891 for the last timestep.
    """

    def __init__(self, timesteps: int, prediction: Prediction):
        settings = {
            "num_train_timesteps": timesteps,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction,
            "rescale_betas_zero_snr": prediction == "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample": False,
        }
        self.timesteps = timesteps
        self.prediction = prediction
        with torch.device("cpu"):  # also where a model's weights are only described
            self.training = DDPMScheduler(**settings)

    def loss(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "batch channel row column"],
        noise_offset: float,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Mean squared error at one random timestep for each latent.

        Args:
            denoiser: The model, its condition already bound.
            latents: Clean latents of about unit scale.
            noise_offset: Standard deviation of the noise that is shared by all positions of a channel.
            generator: Source of the noise and of the timesteps.

        Source: equation 1; noise offset 0.05 in appendix A.
        """
        batch, channels = latents.shape[:2]
        noise = torch.randn(latents.shape, generator=generator)
        noise += noise_offset * torch.randn((batch, channels, 1, 1), generator=generator)
        noise = noise.to(latents)
        steps = _spread_timesteps(batch, self.timesteps, generator).to(latents.device)
        noisy = self.training.add_noise(latents, noise, steps)
        target = noise if self.prediction == "epsilon" else self.training.get_velocity(latents, noise, steps)
        return functional.mse_loss(denoiser(noisy, steps), target)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        noise: Float[Tensor, "batch channel row column"],
        steps: int,
        scheduler: str = "DDIMScheduler",
        seeds: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch channel row column"]:
        """Turn noise into latents of the same precision.

        Args:
            denoiser: The model, its condition already bound; it is asked at the nearest timestep where a scheduler
                wants one between two.
            noise: Of unit variance.
            steps: Denoising steps.
            scheduler: A class of diffusers; by default deterministic DDIM (https://arxiv.org/abs/2010.02502).
            seeds: Of the noise that some schedulers add between steps, one for each of the batch; None counts from 0.

        Raises:
            SamplerError: The scheduler cannot sample from the model.
        """
        sampler = Sampler(self.training, scheduler, steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(noise))]
        latents = sampler.start(noise)
        for step in sampler.timesteps:
            timesteps = step.round().long().to(latents.device).expand(len(latents))
            output = denoiser(sampler.scale(latents, step), timesteps)
            latents = sampler.step(output, step, latents, generators)
        return latents


def _spread_timesteps(batch: int, timesteps: int, generator: torch.Generator) -> Int[Tensor, " batch"]:
    """One uniform timestep from each of `batch` equal parts of the schedule: less variance than independent draws."""
    parts = torch.randperm(batch, generator=generator)
    return ((parts + torch.rand(batch, generator=generator)) * timesteps / batch).long().clamp(max=timesteps - 1)


def add_token_noise(
    tokens: Float[Tensor, "batch token dim"], largest: float, generator: torch.Generator
) -> Float[Tensor, "batch token dim"]:
    """Make tokens as wrong as a story model's may be: noise of a standard deviation between 0 and `largest`."""
    scale = largest * torch.rand((len(tokens), 1, 1), generator=generator)
    return tokens + (scale * torch.randn(tokens.shape, generator=generator)).to(tokens)
