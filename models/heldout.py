"""How well a story model tells keyframes that it was not trained on: likelihoods, and what they are compared with.

Source: the paper, equation 8, for the likelihood; the comparisons are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.autoregressive import AutoregressiveModel
from models.gmm import fit_gaussian
from models.metrics import choose_evenly
from models.processes import process_count, process_index, sum_over_processes
from models.sequence import build_sequence
from models.token_table import TokenTable

MEASURED_ROWS = 20_000


@dataclass(frozen=True)
class HeldoutKeyframes:
    """Keyframes of split "heldout" and the windows in which they are read.

    Attributes:
        keyframes: All of a table.
        window_frames: Most keyframes in a window.
        most_windows: Where there are more, as many are measured, spread evenly over all.
        seed: Draws faces and exchanges.
    """

    keyframes: TokenTable
    window_frames: int
    most_windows: int
    seed: int

    def windows(self) -> list[range]:
        """What is measured: rows of keyframes that are read one after the other."""
        windows = self.keyframes.windows("heldout", self.window_frames)
        return [windows[index] for index in choose_evenly(len(windows), self.most_windows)]

    def nll(self, model: AutoregressiveModel, scripts: Mapping[int, int] | None = None) -> float | None:
        """Negative log-likelihood, nats a token dimension; None without held-out keyframes.

        Several processes measure different windows; each gets the result.

        Args:
            model: What is measured; it is left in evaluation mode.
            scripts: Row of a frame to the row whose script it is given; its own where None.
        """
        rng = np.random.default_rng([self.seed, 1])
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        windows, processes = self.windows(), process_count()
        for start in range(0, len(windows), processes):
            drawn = [
                [self.keyframes.frame(row, rng, script_row=scripts and scripts[row]) for row in window]
                for window in windows[start : start + processes]
            ]
            # A process without a window goes through the first one with the others, who wait for its share of weights.
            own = process_index() if process_index() < len(drawn) else 0
            batch = model.collate([build_sequence(drawn[own], model.tokenizer)])
            likelihood = model.log_likelihood(batch)
            if own == process_index():
                sums += torch.tensor([float(likelihood.double().sum()), len(likelihood)], dtype=torch.float64)
        total, count = sum_over_processes(sums.to(_reducible(model))).tolist()
        return -total / (count * model.config.token_dim) if count else None

    def measure(self, model: AutoregressiveModel, shuffles: int) -> dict[str, Any]:
        """The likelihood and what it is compared with.

        Args:
            model: What is measured.
            shuffles: Random exchanges of scripts that are tried.
        """
        keyframes = self.keyframes
        rows = [row for window in self.windows() for row in window]
        metrics: dict[str, Any] = {
            "unit": "nats per token dimension, lower is better",
            "definition": "mean negative log density of the raw tokens of held-out keyframes, each window of them "
            "read from its first frame on without earlier frames",
            "heldout_frames": len(keyframes.split_rows("heldout")),
            "measured_frames": len(rows),
            "training_frames": len(keyframes.split_rows("train")),
            "nll": self.nll(model),
            "nll_scripts_shuffled": None,
        }
        if len(rows) > 1:
            exchanges = [_exchange(rows, np.random.default_rng([self.seed, 2, i])) for i in range(shuffles)]
            shuffled = [self.nll(model, exchange) for exchange in exchanges]
            metrics["nll_scripts_shuffled"] = float(np.mean(shuffled))
        metrics |= dict.fromkeys(("nll_gaussian_diagonal", "nll_gaussian_full", "gaussian_shrinkage"))
        if rows:
            heldout = np.stack([keyframes.tokens(row).ravel() for row in rows])
            gaussian = fit_gaussian(training_tokens(keyframes).flatten(1))
            for name, correlated in (("diagonal", False), ("full", True)):
                metrics[f"nll_gaussian_{name}"] = gaussian.nll(torch.from_numpy(heldout), correlated)
            metrics["gaussian_shrinkage"] = gaussian.shrinkage
        return metrics


def training_rows(keyframes: TokenTable) -> list[int]:
    """Training keyframes on which statistics are measured: all, or `MEASURED_ROWS` of them, spread evenly."""
    rows = keyframes.split_rows("train")
    return [rows[index] for index in choose_evenly(len(rows), MEASURED_ROWS)]


def training_tokens(keyframes: TokenTable) -> Float[Tensor, "frame token dim"]:
    """Tokens of training keyframes and of their mirror images."""
    rows = training_rows(keyframes)
    tokens = [keyframes.tokens(row, mirrored) for mirrored in (False, True) for row in rows]
    return torch.from_numpy(np.stack(tokens))


def _reducible(model: AutoregressiveModel) -> torch.device:
    """Where numbers must lie for processes to exchange them: NCCL takes them from accelerators only."""
    return model.token_mean.device


def _exchange(rows: list[int], rng: np.random.Generator) -> dict[int, int]:
    """Give each row another row's place: a random cycle, so that none keeps its own."""
    order = rng.permutation(rows).tolist()
    return dict(zip(order, order[1:] + order[:1], strict=True))
