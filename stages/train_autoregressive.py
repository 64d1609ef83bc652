"""Trains the story model: scripts and the frames so far -> the tokens of the next keyframe.

A training sequence is a window of consecutive keyframes of one film, sometimes after reference frames of the same
film. The four measures against overfitting are the paper's: random flips and time reversal, the face of a character
from another frame, dropout, and token masking. The trained model is then measured on held-out windows against itself
with the scripts of other frames, and against one Gaussian fitted to the tokens.

Source: the paper, section 3.3, equations 2 to 8, and appendix A "Autoregressive Model".
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from models import weights
from stages.errors import ComputationError, MissingInputError
from stages.spec import Inputs, Progress, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from models.token_table import TokenTable

HISTORY_POINTS = 200
LOSS_NAMES = ("loss", "nll", "l1", "l2")


class TrainAutoregressiveConfig(StageConfig):
    """Settings of the train_autoregressive stage."""

    trunk: str = Field(
        "llama2_7b",
        description="pretrained language model: a name of `moviedreamer weights list` or a local folder",
    )
    layers: int | None = Field(None, ge=1, description="first layers of the language model to use; null for all")
    window_frames: int = Field(128, ge=1, description="consecutive keyframes in a training sequence")
    batch_windows: int = Field(1, ge=1, description="sequences in a step")
    steps: int = Field(100_000, ge=1, description="training steps")
    learning_rate: float = Field(2e-5, gt=0, description="of the pretrained layers, constant after the warm-up")
    new_learning_rate: float = Field(2e-5, gt=0, description="of the projections, frame marks and mixture head")
    warmup_steps: int = Field(2000, ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    components: int = Field(16, ge=1, description="components of the mixture (k)")
    scale_floor: float = Field(1e-6, gt=0, description="smallest standard deviation, in standardized token units")
    input_dropout: float = Field(0.5, ge=0, lt=1, description="on projected sentences, faces and frame tokens")
    residual_dropout: float = Field(0.5, ge=0, lt=1, description="on attention and feed-forward branches")
    mask_probability: float = Field(0.15, ge=0, lt=1, description="chance that attention cannot see a position")
    context_noise: float = Field(
        0.0, ge=0, description="largest noise on frame tokens that are read, in standardized units; not in the paper"
    )
    carry_previous: bool = Field(
        False,
        description="add a learned share of the frame before to the mixture's locations; not in the paper, for small "
        "runs that are too short to learn it",
    )
    flip_probability: float = Field(0.5, ge=0, le=1, description="chance that a window is mirrored")
    reverse_probability: float = Field(0.5, ge=0, le=1, description="chance that a window runs backwards")
    montage_probability: float = Field(
        0.0, ge=0, le=1, description="chance that a window cuts from one place to another; not in the paper, for films "
        "with few cuts"
    )  # fmt: skip
    references: int = Field(10, ge=0, description="reference frames that may be prepended")
    reference_probability: float = Field(0.5, ge=0, le=1, description="chance that they are")
    shuffles: int = Field(8, ge=1, description="random exchanges of scripts in the held-out comparison")
    evaluation_steps: int = Field(1000, ge=1, description="steps between points of the held-out curve")
    checkpoint_steps: int = neutral(1000, "steps between checkpoints", ge=1)
    seed: int = Field(0, ge=0, description="of everything random")

    def weights(self) -> tuple[str, ...]:
        """The language model."""
        return (self.trunk,)

    def recipe(self) -> dict[str, Any]:
        """Weights enter by what they hold, not by where they lie."""
        return weights.without_places(super().recipe(), "trunk")


SPEC = StageSpec(
    name="train_autoregressive",
    version=3,
    implementation="stages.train_autoregressive:TrainAutoregressive",
    inputs=("tokens",),
    output="autoregressive",
    scope="set",
    cpus=2,
    gpus=1,
    description="Trains the model that turns scripts into keyframe tokens",
)


class TrainAutoregressive:
    """Trains and measures the story model; goes on from the checkpoint in `scratch`."""

    def __init__(self, config: TrainAutoregressiveConfig, weights_dir: Path | None = None) -> None:
        import torch

        self._config, self._weights_dir = config, weights_dir
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Train on the rows of split "train" of `tokens.parquet`.

        Writes model.safetensors, config.json, history.json and metrics.json.

        Returns:
            The content of metrics.json.

        Raises:
            MissingInputError: There is no table of tokens.
            ComputationError: No keyframe is for training, or the loss is no longer a number.
        """
        import torch

        from models.autoregressive import save_autoregressive
        from models.token_table import TokenTable

        if not inputs.get("tokens"):
            raise MissingInputError("there are no tokens: run the tokenize stage first")
        keyframes = TokenTable(inputs["tokens"][0])
        if not keyframes.runs("train"):
            raise ComputationError("no keyframe is for training: lower shards.heldout_share or ingest more films")
        with torch.random.fork_rng():
            torch.manual_seed(self._config.seed)
            model = self._build_model(keyframes)
            history = self._train(model, keyframes, scratch / "checkpoint.safetensors", progress)
        progress(self._config.steps, self._config.steps, "measuring held-out likelihood")
        metrics = self._measure(model, keyframes)
        save_autoregressive(model, out)
        for name, content in (("history", history), ("metrics", metrics)):
            (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return metrics

    def _build_model(self, keyframes: "TokenTable") -> Any:
        import torch

        from models.autoregressive import AutoregressiveConfig, AutoregressiveModel
        from models.language_model import describe_language_model, load_language_model

        config = self._config
        trunk, tokenizer = load_language_model(weights.locate(config.trunk, self._weights_dir), config.layers)
        same = ("components", "scale_floor", "input_dropout", "residual_dropout", "mask_probability", "context_noise",
                "carry_previous")  # fmt: skip
        architecture = AutoregressiveConfig(
            trunk=describe_language_model(trunk),
            **keyframes.widths,
            **{name: getattr(config, name) for name in same},
        )
        model = AutoregressiveModel(architecture, trunk, tokenizer)
        model.fit_standardization(_training_tokens(keyframes))
        sentences = [keyframes.sentences(row) for row in keyframes.split_rows("train")]
        model.fit_text_mean(torch.from_numpy(np.concatenate(sentences)))
        return model.to(self._device)

    def _train(self, model: Any, keyframes: "TokenTable", checkpoint: Path, progress: Progress) -> list[dict[str, Any]]:
        import torch

        config = self._config
        optimizer = torch.optim.AdamW(
            [
                {"params": model.new_parameters(), "rate": config.new_learning_rate},
                {"params": model.trunk_parameters(), "rate": config.learning_rate},
            ],
            weight_decay=config.weight_decay,
        )
        losses, heldout = _load_checkpoint(checkpoint, model, optimizer)
        for step in range(len(losses), config.steps):
            losses.append(self._train_step(model, optimizer, keyframes, step))
            done = step + 1
            if done % config.evaluation_steps == 0 or done == config.steps:
                heldout.append([done, self._heldout_nll(model, keyframes)])
            if done % config.checkpoint_steps == 0 and done < config.steps:
                _save_checkpoint(checkpoint, model, optimizer, losses, heldout)
            progress(done, config.steps, f"loss {np.mean([row[0] for row in losses[-20:]]):.3f}")
        return _history(losses, heldout)

    def _train_step(self, model: Any, optimizer: Any, keyframes: "TokenTable", step: int) -> list[float]:
        """One step. All that is random in it follows from the seed and the step, so a resumed run draws the same."""
        import torch

        config = self._config
        rng = np.random.default_rng([config.seed, step])
        torch.manual_seed(int(rng.integers(2**62)))
        windows = [self._draw_window(keyframes, model.tokenizer, rng) for _ in range(config.batch_windows)]
        model.train()
        losses = model.losses(model.collate(windows))
        if not torch.isfinite(losses.total):
            raise ComputationError(f"the loss of step {step} is {losses.total.item()}: lower the learning rates")
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / max(1, config.warmup_steps))
        optimizer.step()
        optimizer.zero_grad()
        return [value.item() for value in (losses.total, losses.nll, losses.l1, losses.l2)]

    def _draw_window(self, keyframes: "TokenTable", tokenizer: Any, rng: np.random.Generator) -> Any:
        """A training sequence, augmented.

        Source: section 3.3 "Anti-overfitting" and "Few-shot training". References come from outside the window:
        one of its own frames would give away the answer.
        """
        from models.sequence import build_sequence

        config, size = self._config, self._config.window_frames
        cut = int(rng.integers(1, size)) if size > 1 and rng.random() < config.montage_probability else size
        window = [row for part in (cut, size - cut) if part for row in _draw_stretch(keyframes, part, rng)]
        mirrored = bool(rng.random() < config.flip_probability)
        references: list[np.ndarray] = []
        if rng.random() < config.reference_probability:
            inside = set(window)
            others = [row for row in keyframes.training_rows_of(keyframes.films[window[0]]) if row not in inside]
            drawn = rng.choice(others, min(config.references, len(others)), replace=False) if others else []
            references = [keyframes.tokens(int(row), mirrored) for row in drawn]
        order = window[::-1] if rng.random() < config.reverse_probability else window
        return build_sequence([keyframes.frame(row, rng, mirrored) for row in order], tokenizer, references)

    def _heldout_nll(self, model: Any, keyframes: "TokenTable", scripts: dict[int, int] | None = None) -> float | None:
        """Held-out negative log-likelihood, nats a token dimension; None without held-out keyframes.

        Args:
            scripts: Row of a frame to the row whose script it is given; its own where None.
        """
        from models.sequence import build_sequence

        rng = np.random.default_rng([self._config.seed, 1])
        model.eval()
        total, count = 0.0, 0
        for window in keyframes.windows("heldout", self._config.window_frames):
            frames = [keyframes.frame(row, rng, script_row=scripts and scripts[row]) for row in window]
            batch = model.collate([build_sequence(frames, model.tokenizer)])
            likelihood = model.log_likelihood(batch)
            total, count = total - float(likelihood.double().sum()), count + len(likelihood)
        return total / (count * model.config.token_dim) if count else None

    def _measure(self, model: Any, keyframes: "TokenTable") -> dict[str, Any]:
        """The held-out likelihood and what it is compared with."""
        import torch

        from models.gmm import fit_gaussian

        rows, training = keyframes.split_rows("heldout"), keyframes.split_rows("train")
        metrics: dict[str, Any] = {
            "unit": "nats per token dimension, lower is better",
            "definition": "mean negative log density of the raw tokens of held-out keyframes, each window of them "
            "read from its first frame on without earlier frames",
            "heldout_frames": len(rows),
            "training_frames": len(training),
            "nll": self._heldout_nll(model, keyframes),
            "nll_scripts_shuffled": None,
        }
        if len(rows) > 1:
            exchanges = [_exchange(rows, np.random.default_rng([self._config.seed, 2, i]))
                         for i in range(self._config.shuffles)]  # fmt: skip
            shuffled = [self._heldout_nll(model, keyframes, exchange) for exchange in exchanges]
            metrics["nll_scripts_shuffled"] = float(np.mean(shuffled))
        metrics |= dict.fromkeys(("nll_gaussian_diagonal", "nll_gaussian_full", "gaussian_shrinkage"))
        if rows:
            heldout = np.stack([keyframes.tokens(row).ravel() for row in rows])
            gaussian = fit_gaussian(_training_tokens(keyframes).flatten(1))
            for name, correlated in (("diagonal", False), ("full", True)):
                metrics[f"nll_gaussian_{name}"] = gaussian.nll(torch.from_numpy(heldout), correlated)
            metrics["gaussian_shrinkage"] = gaussian.shrinkage
        return metrics


def _draw_stretch(keyframes: "TokenTable", frames: int, rng: np.random.Generator) -> list[int]:
    """Rows of consecutive training keyframes; fewer where a film has no such long run."""
    runs = keyframes.runs("train")
    sizes = np.asarray([len(run) for run in runs], float)
    run = runs[rng.choice(len(runs), p=sizes / sizes.sum())]
    start = int(rng.integers(max(1, len(run) - frames + 1)))
    return run[start : start + frames]


def _training_tokens(keyframes: "TokenTable") -> Any:
    """Tokens of the training keyframes and of their mirror images, float32 [frame, token, dim]."""
    import torch

    rows = keyframes.split_rows("train")
    tokens = [keyframes.tokens(row, mirrored) for mirrored in (False, True) for row in rows]
    return torch.from_numpy(np.stack(tokens))


def _exchange(rows: list[int], rng: np.random.Generator) -> dict[int, int]:
    """Give each row another row's place: a random cycle, so that none keeps its own."""
    order = rng.permutation(rows).tolist()
    return dict(zip(order, order[1:] + order[:1], strict=True))


def _history(losses: list[list[float]], heldout: list[list[Any]]) -> list[dict[str, Any]]:
    """Means over at most 200 stretches of steps, then the held-out curve."""
    stretch = max(1, -(-len(losses) // HISTORY_POINTS))
    points = []
    for start in range(0, len(losses), stretch):
        part = np.asarray(losses[start : start + stretch])
        means = dict(zip(LOSS_NAMES, part.mean(0).tolist(), strict=True))
        points.append({"phase": "train", "step": start + len(part), **means})
    return points + [{"phase": "heldout", "step": step, "loss": nll} for step, nll in heldout if nll is not None]


def _save_checkpoint(
    path: Path, model: Any, optimizer: Any, losses: list[list[float]], heldout: list[list[Any]]
) -> None:
    """Everything that later steps depend on; written beside and then renamed, so it is whole or not there."""
    import torch
    from safetensors.torch import save_file

    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tensors = {f"model/{name}": value for name, value in model.state_dict().items() if name not in frozen}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    beside = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, beside, {"heldout": json.dumps(heldout)})
    beside.replace(path)


def _load_checkpoint(path: Path, model: Any, optimizer: Any) -> tuple[list[list[float]], list[list[Any]]]:
    """Fill model and optimizer; the losses and the held-out curve so far, empty where there is no checkpoint."""
    if not path.is_file():
        return [], []
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = load_file(path)
    with safe_open(path, framework="pt") as stream:
        heldout = json.loads(stream.metadata()["heldout"])
    model.load_state_dict({n.removeprefix("model/"): v for n, v in tensors.items() if n[:6] == "model/"}, strict=False)
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, part = name.split("/")
            state.setdefault(int(index), {})[part] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return tensors["losses"].tolist(), heldout
