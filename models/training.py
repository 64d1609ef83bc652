"""A training run: optimizer, moving average, randomness and history, on one process or several, with checkpoints.

What a trainer does with it, on any number of processes:

    run = TrainingRun(dict(model.named_parameters()), seed=0, average_decay=0.999)
    run.restore(scratch / "checkpoints")
    while run.step < steps:
        run.update(loss_of(model, batch_of(run.step)), learning_rate)
        run.save(scratch / "checkpoints")   # now and then
    run.use_averages()

Every process makes the same calls. A model of several processes comes from `models.processes.place_model`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from models.sharded_checkpoint import load_tensors, newest_checkpoint, read_state, save_checkpoint, tensor_names

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, beside the number of its steps."""


class TrainingRun:
    """AdamW, a moving average of the weights, randomness and history of a run that a checkpoint restores exactly.

    A parameter without a gradient (frozen in this step, or not used) is left alone. Freeze with `requires_grad_`.

    Attributes:
        generator: On the CPU, the same in all processes: draw for all, then take one's own part.
        history: JSON values that the trainer appends to; kept with the checkpoints.
        phase: Number of the phase.
        step: Steps taken in this phase.
        total_steps: Steps taken in all.
        gradient_norm: Norm of the last step's gradients before they were scaled down; on the parameters' device.

    Args:
        groups: What is trained, by name; each group has a learning rate of its own.
        seed: Of all randomness of the run.
        average_decay: Of the exponential moving average; early steps use less, so that the start is forgotten.
            None for no average.
        largest_norm: Gradients are scaled down to this norm, that of all groups together.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        model: The sharded model whose parameters these are, where steps are made of several losses: its gradients
            are then brought together once a step.
    """

    def __init__(
        self,
        *groups: Mapping[str, nn.Parameter],
        seed: int,
        average_decay: float | None = None,
        largest_norm: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        model: nn.Module | None = None,
    ) -> None:
        self._groups = [list(group.values()) for group in groups]
        self.parameters = {name: parameter for group in groups for name, parameter in group.items()}
        self.average_decay = average_decay
        self.averages: dict[str, Tensor] = {}
        if average_decay is not None:
            self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.largest_norm = largest_norm
        self._settings: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay}
        self._sharded = model if isinstance(model, FSDPModule) else None
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[Any] = []
        self.total_steps = 0
        self.gradient_norm: Tensor = torch.zeros(())
        self.begin_phase(0)

    def begin_phase(self, phase: int) -> None:
        """Start a phase: step 0 and a fresh optimizer."""
        self.phase, self.step = phase, 0
        groups = [{"params": group} for group in self._groups]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **self._settings)

    def update(self, loss: Float[Tensor, ""], *learning_rates: float) -> None:
        """Take one optimizer step down a loss, and move the averages.

        Args:
            loss: Of this process's part; gradients are averaged over processes.
            learning_rates: One for each group.
        """
        self.add_gradients(loss)
        self.take_step(*learning_rates)

    def add_gradients(self, loss: Float[Tensor, ""], parts: int = 1, is_last: bool = True) -> None:
        """Go back through one of the losses whose mean a step goes down.

        Args:
            loss: Of one micro-batch.
            parts: How many there are in the step on this process.
            is_last: Whether it is the last of them; only then do sharded gradients travel.
        """
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(is_last)
        (loss / parts if parts > 1 else loss).backward()

    def take_step(self, *learning_rates: float) -> None:
        """Take one optimizer step along the gradients that were added, and move the averages."""
        trained = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, self.largest_norm)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.total_steps += 1
        if self.average_decay is not None:
            decay = min(self.average_decay, self.total_steps / (self.total_steps + 9))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def use_averages(self) -> None:
        """Put the averaged weights in the place of the trained ones: training is over."""
        for name, average in self.averages.items():
            self.parameters[name].copy_(average)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into a folder of checkpoints; older ones there are removed when it is whole."""
        state = {
            "phase": self.phase,
            "step": self.step,
            "total_steps": self.total_steps,
            "generator": bytes(self.generator.get_state().tolist()).hex(),
            "history": self.history,
        }
        save_checkpoint(folder, f"{self.total_steps:08d}-{self.phase:03d}", self._tensors(), state)

    def restore(self, folder: Path) -> bool:
        """Take up where the newest checkpoint was written, on however many processes; False where there is none.

        Tensors keep the memory layout they have here.
        """
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            return False
        state = read_state(checkpoint)
        self.begin_phase(state["phase"])
        self.step, self.total_steps, self.history = state["step"], state["total_steps"], state["history"]
        self.generator.set_state(torch.tensor(list(bytes.fromhex(state["generator"])), dtype=torch.uint8))
        stored = tensor_names(checkpoint)
        for name, parameter in self.parameters.items():
            if f"step.{name}" in stored:
                moments = {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        load_tensors(checkpoint, self._tensors())
        return True

    def _tensors(self) -> dict[str, Tensor]:
        """All that is large, by name; changing them changes the run."""
        tensors = {f"average.{name}": average for name, average in self.averages.items()}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for part, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{part}.{name}"] = value
        return tensors


def schedule_learning_rate(
    peak: float, step: int, steps: int, schedule: Literal["cosine", "constant"], warmup_steps: int
) -> float:
    """The learning rate of one step: a linear warm-up, then half a cosine down to zero or the peak throughout."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0
    return peak * warmup * fall
