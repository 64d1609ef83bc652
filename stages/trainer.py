"""What the trainers share: settings of how training runs, one optimizer step, and the log of its numbers."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.errors import ComputationError
from stages.spec import Progress, StageConfig, neutral

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.training import TrainingRun

Write = Callable[[int, dict[str, float]], None]
"""Called with a step and its numbers."""


class TrainerConfig(StageConfig):
    """Settings of every trainer."""

    micro_batches: int = Field(
        1, ge=1, description="equal parts in which a step's batch is computed, one after the other or by several "
        "processes; more take less memory"
    )  # fmt: skip
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the networks' matrix products; weights, optimizer and losses stay float32"
    )
    processes: int = neutral(
        1, "processes that train together, each on an accelerator of its own where there are any; results are equal up "
        "to rounding. Those on several hosts need scratch and weights on a file system that the hosts share", ge=1
    )  # fmt: skip
    gradient_checkpointing: bool = neutral(False, "compute activations twice in place of keeping them: less memory")
    loader_workers: int = neutral(0, "processes that make batches ahead of training; 0 for none", ge=0)
    log_dir: Path | None = neutral(None, "folder of TensorBoard's logs; none: `logs` in the workspace's scratch folder")
    tracker: Literal["none", "mlflow", "wandb"] = neutral(
        "none", "where numbers of the run go beside; addresses and keys come from the tracker's environment variables"
    )

    def starts_processes(self) -> bool:
        """Training processes are started by the job and ask for cores and accelerators themselves."""
        return self.processes > 1

    def check_parts(self, name: str, batch: int) -> None:
        """A step is the mean over micro-batches of one size, which processes share evenly.

        Raises:
            ValueError: The batch, a setting of this name, cannot be cut so.
        """
        if batch % self.micro_batches:
            raise ValueError(
                f"{name} {batch} cannot be cut into {self.micro_batches} equal micro_batches: "
                "choose a multiple of micro_batches"
            )
        if self.micro_batches % self.processes:
            raise ValueError(
                f"{self.processes} processes cannot share {self.micro_batches} micro_batches evenly: raise "
                f"{name} and micro_batches to a multiple of processes"
            )


def train_in_processes(
    config: TrainerConfig, cpus: float, body: Callable[..., dict[str, Any]], scratch: Path, progress: Progress
) -> dict[str, Any]:
    """Run a trainer's body here, or in several processes that form a group.

    Args:
        config: Says how many.
        cpus: Cores for each.
        body: Can be pickled; called with a progress.
        scratch: A folder that all processes see.
        progress: Told what the first process tells.

    Raises:
        ComputationError: A process failed.
        TrackerError: The tracker is not installed.
    """
    from models.training_log import load_tracker

    load_tracker(config.tracker)
    if config.processes == 1:
        return body(progress)
    from stages.training_processes import run_processes

    return run_processes(body, config.processes, cpus, scratch, progress)


def open_training_log(config: TrainerConfig, scratch: Path, step: int) -> AbstractContextManager[Write]:
    """Where the numbers of each step go: a log in the first process, nowhere in the others."""
    from models.training_log import open_log

    folder = (config.log_dir or scratch.parent / "logs") / scratch.name
    return open_log(folder, config.tracker, config.model_dump(mode="json"), step)


def train_step(
    run: "TrainingRun",
    config: TrainerConfig,
    batches: Iterator[Any],
    losses_of: Callable[[Any, int], "Tensor"],
    learning_rates: dict[str, float],
) -> tuple[list[float], dict[str, float]]:
    """One optimizer step over this process's micro-batches.

    Args:
        run: What is trained.
        config: Says how many micro-batches there are.
        batches: Micro-batches; as many are taken as fall to this process.
        losses_of: Gives a batch's losses as one tensor, the one to go down first. It is also given the micro-batch's
            place in the step, from which, with the step, all that is random has to follow.
        learning_rates: One for each group of the run, in their order; its name is what the log calls it.

    Returns:
        The losses, means over all processes, and the step's other numbers: norm of the gradients, share of the time
        spent waiting for data, seconds, learning rates.

    Raises:
        ComputationError: The loss is no longer a number.
    """
    from models.processes import process_count, process_index, sum_over_processes

    places = range(process_index(), config.micro_batches, process_count())
    started, waited, sums = time.perf_counter(), 0.0, None
    for number, place in enumerate(places):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        losses = losses_of(batch, place)
        run.add_gradients(losses[0], len(places), number == len(places) - 1)
        sums = losses.detach() if sums is None else sums + losses.detach()
    means = (sum_over_processes(sums) / config.micro_batches).tolist()
    if not math.isfinite(means[0]):
        raise ComputationError(f"the loss of step {run.step} is {means[0]}: lower the learning rates")
    run.take_step(*learning_rates.values())
    norm, seconds = run.gradient_norm.item(), time.perf_counter() - started
    if not math.isfinite(norm):  # before anybody keeps these weights
        raise ComputationError(f"the gradients of step {run.step} have norm {norm}: lower the learning rates")
    return means, {"gradient_norm": norm, "wait_share": waited / seconds, "seconds": seconds} | learning_rates


def generator_of(*place: int) -> "torch.Generator":
    """Randomness that follows from a seed, a step and a place in it, on the CPU."""
    import numpy as np
    import torch

    return torch.Generator().manual_seed(int(np.random.default_rng(list(place)).integers(2**62)))


def describe_progress(losses: list[float], numbers: dict[str, float]) -> str:
    """The mean of the latest losses, and how much of a step is waiting for data, where it is much."""
    latest = losses[-20:]
    waiting = f", waiting for data {numbers['wait_share']:.0%}" if numbers["wait_share"] > 0.02 else ""
    return f"loss {sum(latest) / len(latest):.4f}{waiting}"
