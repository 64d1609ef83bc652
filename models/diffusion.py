"""Diffusion as the image decoder uses it: noise schedule, loss of equation 1, sampling, a resumable training run.

Dimensions: batch; channel, row, column of a latent.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
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


class TrainingRun:
    """Optimizer, moving average of the weights, randomness and history of a run that a checkpoint restores exactly.

    Args:
        parameters: What is trained, by name.
        seed: Of all randomness of the run.
        average_decay: Of the exponential moving average; early steps use less, so that the start is forgotten.
        gradient_norm: Gradients are scaled down to this norm.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], seed: int, average_decay: float, gradient_norm: float
    ) -> None:
        self.parameters = dict(parameters)
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.average_decay = average_decay
        self.gradient_norm = gradient_norm
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[dict[str, Any]] = []
        self.total_steps = 0
        self.begin_phase(0)

    def begin_phase(self, phase: int) -> None:
        """Start a phase: step 0 and a fresh optimizer."""
        self.phase, self.step = phase, 0
        self.optimizer = torch.optim.AdamW(self.parameters.values(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def update(self, loss: Float[Tensor, ""], learning_rate: float) -> None:
        """Take one optimizer step, and move the averages."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for p in self.parameters.values() if p.grad is not None]
        nn.utils.clip_grad_norm_(trained, self.gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.step += 1
        self.total_steps += 1
        decay = min(self.average_decay, self.total_steps / (self.total_steps + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def use_averages(self) -> None:
        """Put the averaged weights in the place of the trained ones: training is over."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])

    def save(self, path: Path) -> None:
        """Write a checkpoint; an older one at the same path is replaced in one move."""
        tensors = {"generator": self.generator.get_state()}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.averages[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        counts = {"phase": self.phase, "step": self.step, "total_steps": self.total_steps}
        metadata = {"run": json.dumps({**counts, "history": self.history})}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.replace(path)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Take up where the checkpoint was written. Tensors keep the memory layout they have here."""
        with safe_open(path, framework="pt") as file:
            run = json.loads(file.metadata()["run"])
            self.begin_phase(run["phase"])
            self.step, self.total_steps, self.history = run["step"], run["total_steps"], run["history"]
            self.generator.set_state(file.get_tensor("generator"))
            stored = set(file.keys())
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
                self.averages[name].copy_(file.get_tensor(f"average.{name}"))
                if f"step.{name}" in stored:
                    self.optimizer.state[parameter] = {
                        "step": file.get_tensor(f"step.{name}"),
                        "exp_avg": torch.empty_like(parameter).copy_(file.get_tensor(f"exp_avg.{name}")),
                        "exp_avg_sq": torch.empty_like(parameter).copy_(file.get_tensor(f"exp_avg_sq.{name}")),
                    }


def schedule_learning_rate(
    peak: float, step: int, steps: int, schedule: Literal["cosine", "constant"], warmup_steps: int
) -> float:
    """The learning rate of one step: a linear warm-up, then half a cosine down to zero or the peak throughout."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0
    return peak * warmup * fall


def add_token_noise(
    tokens: Float[Tensor, "batch token dim"], largest: float, generator: torch.Generator
) -> Float[Tensor, "batch token dim"]:
    """Make tokens as wrong as a story model's may be: noise of a standard deviation between 0 and `largest`."""
    scale = largest * torch.rand((len(tokens), 1, 1), generator=generator)
    return tokens + (scale * torch.randn(tokens.shape, generator=generator)).to(tokens)
