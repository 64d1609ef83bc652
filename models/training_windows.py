"""What the story model is trained on: windows of consecutive keyframes, drawn, augmented and laid out as batches.

All that is random in a batch follows from the seed, the step and the batch's place in it, so it does not matter which
process draws it, or when.

Source: the paper, section 3.3 "Anti-overfitting" and "Few-shot training".
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from models.processes import process_count, process_index
from models.sequence import FrameSequence, SequenceBatch, build_sequence, collate_sequences
from models.token_table import TokenTable

PREFETCHED = 2
"""Batches that each loading process draws ahead."""


@dataclass(frozen=True)
class WindowSettings:
    """How windows are drawn.

    Attributes:
        window_frames: Consecutive keyframes in one.
        batch_windows: Windows in a step.
        micro_batches: Equal parts in which a step's windows are computed.
        flip_probability: Chance that a window is mirrored.
        reverse_probability: Chance that it runs backwards.
        montage_probability: Chance that it cuts from one place to another.
        references: Reference frames that may be prepended.
        reference_probability: Chance that they are.
        seed: Of all draws.
    """

    window_frames: int
    batch_windows: int
    micro_batches: int
    flip_probability: float
    reverse_probability: float
    montage_probability: float
    references: int
    reference_probability: float
    seed: int


class TrainingWindows(Dataset):
    """The micro-batches of a training run, by step and place in the step.

    Args:
        keyframes: Where windows come from; some are for training.
        tokenizer: Of the language model.
        settings: How they are drawn.
    """

    def __init__(self, keyframes: TokenTable, tokenizer: Tokenizer, settings: WindowSettings) -> None:
        self._keyframes, self._tokenizer, self._settings = keyframes, tokenizer, settings
        sizes = np.cumsum([len(run) for run in keyframes.runs("train")])
        self._run_shares = sizes / sizes[-1]

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, SequenceBatch]:
        """The seed of what else is random in a micro-batch, and the micro-batch, on the CPU.

        Args:
            place: The step, and the place in it.
        """
        settings, widths = self._settings, self._keyframes.widths
        rng = np.random.default_rng([settings.seed, *place])
        seed = int(rng.integers(2**62))
        windows = [self.draw(rng) for _ in range(settings.batch_windows // settings.micro_batches)]
        return seed, collate_sequences(windows, widths["text_width"], widths["face_width"], widths["token_dim"])

    def draw(self, rng: np.random.Generator) -> FrameSequence:
        """A training sequence, augmented.

        References come from outside the window: one of its own frames would give away the answer.
        """
        settings, keyframes = self._settings, self._keyframes
        size = settings.window_frames
        cut = int(rng.integers(1, size)) if size > 1 and rng.random() < settings.montage_probability else size
        window = [row for part in (cut, size - cut) if part for row in self._draw_stretch(part, rng)]
        mirrored = bool(rng.random() < settings.flip_probability)
        references: list[np.ndarray] = []
        if rng.random() < settings.reference_probability:
            inside = set(window)
            others = [row for row in keyframes.training_rows_of(keyframes.films[window[0]]) if row not in inside]
            drawn = rng.choice(others, min(settings.references, len(others)), replace=False) if others else []
            references = [keyframes.tokens(int(row), mirrored) for row in drawn]
        order = window[::-1] if rng.random() < settings.reverse_probability else window
        return build_sequence([keyframes.frame(row, rng, mirrored) for row in order], self._tokenizer, references)

    def _draw_stretch(self, frames: int, rng: np.random.Generator) -> range:
        """Rows of consecutive training keyframes; fewer where a film has no such long run."""
        run = self._keyframes.runs("train")[np.searchsorted(self._run_shares, rng.random(), side="right")]
        start = int(rng.integers(max(1, len(run) - frames + 1)))
        return run[start : start + frames]


def load_windows(
    windows: TrainingWindows, steps: Iterable[int], micro_batches: int, workers: int, device: str
) -> Iterator[tuple[int, SequenceBatch]]:
    """This process's micro-batches of each step, one after the other.

    Args:
        windows: What is drawn.
        steps: In their order.
        micro_batches: Of a step, over all processes.
        workers: Processes that draw ahead of training; 0 draws when a batch is asked for.
        device: Where batches go to; for an accelerator they are kept in pinned memory.
    """
    places = list(itertools.product(steps, range(process_index(), micro_batches, process_count())))
    loader = DataLoader(
        windows,
        batch_size=None,
        sampler=places,  # type: ignore[arg-type]
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # a copy of a process with threads may hang
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=device == "cuda",
        generator=torch.Generator(),  # its own: without one it would draw from the model's
    )
    return iter(loader)
