"""Schedulers of diffusers as samplers of a model that was trained under one noise schedule.

Source: https://github.com/huggingface/diffusers; zero terminal signal-to-noise ratio after
https://arxiv.org/abs/2305.08891.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

NEEDED = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing"}
PURE_NOISE = "rescale_betas_zero_snr"


class SamplerError(ValueError):
    """A scheduler cannot sample from the model; the message lists those that can."""


class Sampler:
    """A scheduler with the noise levels of training, set to a number of steps.

    Args:
        training: The schedule of training.
        name: A class of diffusers.
        steps: Denoising steps; Heun's and KDPM2's ask the model twice in each.

    Raises:
        SamplerError: There is no such scheduler, or it cannot follow the schedule of training.
    """

    def __init__(self, training: DDPMScheduler, name: str, steps: int) -> None:
        family = _choose(training, name)
        try:
            with _quiet():
                self._scheduler: SchedulerMixin = family.from_config(training.config)
                self._scheduler.set_timesteps(steps)
        except (ValueError, IndexError) as error:
            most = training.config.num_train_timesteps
            raise SamplerError(
                f"{name} cannot take {steps} steps ({error}): choose another number, at most {most}"
            ) from error
        self._draws = "generator" in inspect.signature(self._scheduler.step).parameters
        self.timesteps: Tensor = self._scheduler.timesteps

    def start(self, noise: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Unit noise in the scheduler's own scale."""
        return noise * self._scheduler.init_noise_sigma

    def scale(self, latents: Float[Tensor, "batch ..."], step: Tensor) -> Float[Tensor, "batch ..."]:
        """Latents as the model knows them: signal and noise with squares that add up to one."""
        return self._scheduler.scale_model_input(latents, step)

    def step(
        self,
        output: Float[Tensor, "batch ..."],
        step: Tensor,
        latents: Float[Tensor, "batch ..."],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "batch ..."]:
        """Latents one step further, in their own precision; each takes fresh noise, if any, from its own generator."""
        drawn = {"generator": list(generators)} if self._draws else {}
        with _quiet():
            return self._scheduler.step(output.to(latents), step, latents, **drawn).prev_sample


def fitting_schedulers(training: DDPMScheduler) -> dict[str, type[SchedulerMixin]]:
    """Name to class of those that can follow a schedule of training."""
    needed = NEEDED | ({PURE_NOISE} if training.config.rescale_betas_zero_snr else set())
    families = sorted(training.compatibles, key=lambda family: family.__name__)
    return {f.__name__: f for f in families if needed <= inspect.signature(f.__init__).parameters.keys()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what NumPy says of diffusers, which hands it tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array_", category=DeprecationWarning)
        yield


def _choose(training: DDPMScheduler, name: str) -> type[SchedulerMixin]:
    fitting = fitting_schedulers(training)
    if name in fitting:
        return fitting[name]
    why = "is no scheduler of diffusers that follows the model's noise schedule"
    if name in {family.__name__ for family in training.compatibles} and training.config.rescale_betas_zero_snr:
        why = f"cannot start from pure noise, as this model with {training.config.prediction_type} was trained to"
    raise SamplerError(f"scheduler {name!r} {why}: expected one of {', '.join(fitting)}")
