"""Batches in an order that the seed sets, read ahead of the training process."""

import functools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.processes import process_count, process_index

READ_AHEAD = 4
"""Batches that each reading process keeps ready."""


class StepBatches:
    """The samples of this process's micro-batches of each step: every sample once before any comes again.

    Args:
        samples: What to draw from.
        batch: Samples a step, over all processes.
        steps: Steps to give the samples of; a resumed run begins later.
        seed: Of the order.
        micro_batches: Equal parts of a step, over all processes.
    """

    def __init__(self, samples: Sequence[int], batch: int, steps: range, seed: int, micro_batches: int = 1) -> None:
        self._samples, self._batch, self._steps, self._seed = samples, batch, steps, seed
        self._parts, self._own = micro_batches, range(process_index(), micro_batches, process_count())

    def __len__(self) -> int:
        return len(self._steps) * len(self._own)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            places = draw_batch(len(self._samples), self._batch, step, self._seed).chunk(self._parts)
            for part in self._own:
                yield [self._samples[place] for place in places[part].tolist()]


def load_batches(dataset: Dataset, batches: StepBatches, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of a data set, stacked.

    Args:
        dataset: Gives a tuple of tensors for each sample.
        batches: The samples of each step.
        workers: Processes that read ahead; 0 reads in this one, between the steps.
    """
    ahead = {"prefetch_factor": READ_AHEAD, "multiprocessing_context": "forkserver"} if workers else {}
    pinned = torch.cuda.is_available()
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=pinned, generator=torch.Generator(), **ahead
    )
    yield from loader


def draw_batch(count: int, batch: int, step: int, seed: int) -> Int[Tensor, " batch"]:
    """Indices of one step's samples: every sample once before any comes again, in an order that the seed sets."""
    places = torch.arange(step * batch, (step + 1) * batch)
    indices = torch.empty(batch, dtype=torch.long)
    for epoch in (places // count).unique().tolist():
        inside = places // count == epoch
        indices[inside] = _draw_order(count, epoch, seed)[places[inside] % count]
    return indices


@functools.lru_cache(maxsize=2)
def _draw_order(count: int, epoch: int, seed: int) -> Int[Tensor, " count"]:
    """One epoch's order; kept, because many steps take their part of it."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
