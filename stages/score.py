"""Tells how well a story model knows keyframes that it never saw: one number that compares across tokenizers.

A held-out keyframe's script, and the keyframes before it, give the model's density of its tokens. Under that density
the keyframe itself is ranked among all held-out keyframes; the score is the mean reciprocal rank. A likelihood would
not do: two models with autoencoders of their own speak of tokens in different units, while a rank has none.

Keyframes of films kept out of training as a whole (split `test`) are taken where there are any, else the held-out ends
of the films.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from stages.errors import MissingInputError
from stages.spec import Inputs, Progress, StageConfig, StageSpec

if TYPE_CHECKING:
    from models.token_table import TokenTable


class ScoreConfig(StageConfig):
    """Settings of the score."""

    window_frames: int = Field(128, ge=1, description="keyframes read one after the other before the model starts anew")
    candidates: int = Field(1000, ge=2, description="held-out keyframes ranked against each other, at most")
    seed: int = Field(0, ge=0, description="draws the faces that conditioning shows")


SPEC = StageSpec(
    name="score",
    version=1,
    implementation="stages.score:Score",
    inputs=("tokens", "autoregressive"),
    output="score",
    scope="set",
    cpus=2,
    gpus=1,
    description="how well a story model tells held-out keyframes from each other",
)


class Score:
    """Writes `score.json`."""

    def __init__(self, config: ScoreConfig, weights_dir: Path | None = None) -> None:
        self._config = config

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Rank.

        Returns:
            `mean_reciprocal_rank` (0 to 1, higher is better), `top1` (share ranked first), `chance` (the mean
            reciprocal rank of guessing), `keyframes` and `split`.

        Raises:
            MissingInputError: There are not two held-out keyframes.
        """
        from models.autoregressive import load_autoregressive
        from models.token_table import TokenTable

        keyframes = TokenTable(inputs["tokens"][0].parent)
        split = "test" if len(keyframes.split_rows("test")) > 1 else "heldout"
        rows = keyframes.split_rows(split)[: self._config.candidates]
        if len(rows) < 2:
            raise MissingInputError(
                f"{len(rows)} keyframes are held out, at least 2 are needed: ingest more films, give some the split "
                "`test` in a catalogue, or raise shards.heldout_share"
            )
        model = load_autoregressive(next(p for p in inputs["autoregressive"] if p.name == "model.safetensors"))
        ranks = []
        for rank in self._rank(model, keyframes, split, rows):
            ranks.append(rank)
            progress(len(ranks), len(rows), "ranking held-out keyframes")
        found = {
            "mean_reciprocal_rank": float(np.mean([1 / rank for rank in ranks])),
            "top1": float(np.mean([rank == 1 for rank in ranks])),
            "chance": float(np.mean(1 / np.arange(1, len(rows) + 1))),
            "keyframes": len(rows),
            "split": split,
        }
        (out / "score.json").write_text(json.dumps(found, indent=1) + "\n")
        return found

    def _rank(self, model: Any, keyframes: "TokenTable", split: str, rows: list[int]) -> Iterator[int]:
        """The rank of each keyframe among all of them, 1 the best; ties count against it."""
        import torch

        from models.sequence import build_sequence

        rng = np.random.default_rng([self._config.seed, 3])
        tokens = torch.from_numpy(np.concatenate([keyframes.tokens(row) for row in rows]))
        values = model.standardize(tokens).view(len(rows), -1, model.config.token_dim)
        wanted = {row: index for index, row in enumerate(rows)}
        for window in keyframes.windows(split, self._config.window_frames):
            frames = [keyframes.frame(row, rng) for row in window]
            with torch.no_grad():
                mixture, _ = model.predict(model.collate([build_sequence(frames, model.tokenizer)]))
            for position, row in enumerate(window):
                if row in wanted:
                    of_frame = slice(position * values.shape[1], (position + 1) * values.shape[1])
                    scores = mixture[of_frame].log_prob(values).sum(-1)
                    yield int((scores >= scores[wanted[row]]).sum())
