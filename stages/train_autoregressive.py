"""Trains the story model: scripts and the frames so far -> the tokens of the next keyframe.

A training sequence is a window of consecutive keyframes of one film, sometimes after reference frames of the same
film. The four measures against overfitting are the paper's: random flips and time reversal, the face of a character
from another frame, dropout, and token masking. The trained model is then measured on held-out windows against itself
with the scripts of other frames, and against one Gaussian fitted to the tokens.

Source: the paper, section 3.3, equations 2 to 8, and appendix A "Autoregressive Model".
"""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from models import weights
from stages.errors import ComputationError, MissingInputError
from stages.spec import Inputs, Progress, StageSpec, neutral
from stages.trainer import TrainerConfig, describe_progress, open_training_log, train_in_processes, train_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from models.autoregressive import AutoregressiveModel
    from models.sequence import SequenceBatch
    from models.token_table import TokenTable
    from models.training import TrainingRun

HISTORY_POINTS = 200
LOSS_NAMES = ("loss", "nll", "l1", "l2")


class TrainAutoregressiveConfig(TrainerConfig):
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
    heldout_windows: int = Field(64, ge=1, description="windows of held-out keyframes that are measured, at most")
    shuffles: int = Field(8, ge=1, description="random exchanges of scripts in the held-out comparison")
    evaluation_steps: int = Field(1000, ge=1, description="steps between points of the held-out curve")
    checkpoint_steps: int = neutral(1000, "steps between checkpoints", ge=1)
    seed: int = Field(0, ge=0, description="of everything random")

    @model_validator(mode="after")
    def _check_batch(self) -> "TrainAutoregressiveConfig":
        self.check_parts("batch_windows", self.batch_windows)
        return self

    def weights(self) -> tuple[str, ...]:
        """The language model."""
        return (self.trunk,)

    def recipe(self) -> dict[str, Any]:
        """Weights enter by what they hold, not by where they lie."""
        return weights.without_places(super().recipe(), "trunk")


SPEC = StageSpec(
    name="train_autoregressive",
    version=5,
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
        self._config, self._weights_dir = config, weights_dir

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Train on the rows of split "train" of the table of tokens.

        Writes model.safetensors (float32, whatever the precision of training), config.json, history.json and
        metrics.json.

        Returns:
            The content of metrics.json.

        Raises:
            MissingInputError: There is no table of tokens.
            ComputationError: No keyframe is for training, the loss is no longer a number, or a process failed.
            TrackerError: The tracker is not installed.
        """
        from models.token_table import TokenTable

        if not inputs.get("tokens"):
            raise MissingInputError("there are no tokens: run the tokenize stage first")
        keyframes = TokenTable(inputs["tokens"][0].parent)
        if not keyframes.runs("train"):
            raise ComputationError("no keyframe is for training: lower shards.heldout_share or ingest more films")
        body = partial(self._run, keyframes, out, scratch)
        return train_in_processes(self._config, SPEC.cpus, body, scratch, progress)

    def _run(self, keyframes: "TokenTable", out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Everything, in each process that trains; the first one writes the results."""
        import torch

        from models.autoregressive import save_autoregressive
        from models.heldout import HeldoutKeyframes
        from models.processes import gather_weights, process_index

        config = self._config
        heldout = HeldoutKeyframes(keyframes, config.window_frames, config.heldout_windows, config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = self._place_model(keyframes)
            history = self._train(model, keyframes, heldout, scratch, progress)
        progress(config.steps, config.steps, "measuring held-out likelihood")
        metrics = heldout.measure(model, config.shuffles)
        trained = gather_weights(model)
        if process_index() == 0:
            save_autoregressive(model, out, trained)
            for name, content in (("history", history), ("metrics", metrics)):
                (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return metrics

    def _place_model(self, keyframes: "TokenTable") -> "AutoregressiveModel":
        import torch

        from models.processes import place_model

        model = place_model(
            partial(self._build_model, keyframes),
            lambda model: model.trunk.layers,
            ("losses", "log_likelihood"),
            "cuda" if torch.cuda.is_available() else "cpu",
            self._config.precision,
        )
        model.precision = self._config.precision
        if self._config.gradient_checkpointing:
            model.trunk.activation_checkpointing_enable()
        return model

    def _build_model(self, keyframes: "TokenTable", with_weights: bool = True) -> "AutoregressiveModel":
        import torch

        from models.autoregressive import AutoregressiveConfig, AutoregressiveModel
        from models.heldout import training_rows, training_tokens
        from models.language_model import describe_language_model, load_language_model

        config, folder = self._config, weights.locate(self._config.trunk, self._weights_dir)
        trunk, tokenizer = load_language_model(folder, config.layers, empty=not with_weights)
        same = ("components", "scale_floor", "input_dropout", "residual_dropout", "mask_probability", "context_noise",
                "carry_previous")  # fmt: skip
        architecture = AutoregressiveConfig(
            trunk=describe_language_model(trunk),
            **keyframes.widths,
            **{name: getattr(config, name) for name in same},
        )
        model = AutoregressiveModel(architecture, trunk, tokenizer)
        if with_weights:
            model.fit_standardization(training_tokens(keyframes))
            sentences = [keyframes.sentences(row) for row in training_rows(keyframes)]
            model.fit_text_mean(torch.from_numpy(np.concatenate(sentences)))
        return model

    def _train(
        self, model: "AutoregressiveModel", keyframes: "TokenTable", heldout: Any, scratch: Path, progress: Progress
    ) -> list[dict[str, Any]]:
        from models.training import TrainingRun
        from models.training_windows import load_windows

        config = self._config
        groups = model.new_parameters(), model.trunk_parameters()
        run = TrainingRun(*groups, seed=config.seed, weight_decay=config.weight_decay, model=model)
        run.restore(scratch / "checkpoints")
        windows = _make_windows(config, keyframes, model.tokenizer)
        batches = load_windows(
            windows, range(run.step, config.steps), config.micro_batches, config.loader_workers, _device_of(model)
        )
        with open_training_log(config, scratch, run.step) as write:
            while run.step < config.steps:
                losses, numbers = self._train_step(model, run, batches)
                write(run.step, losses | numbers)
                run.history.append({"phase": "train", "step": run.step} | losses)
                if run.step % config.evaluation_steps == 0 or run.step == config.steps:
                    run.history.append({"phase": "heldout", "step": run.step, "loss": heldout.nll(model)})
                if run.step % config.checkpoint_steps == 0 or run.step == config.steps:
                    run.save(scratch / "checkpoints")
                latest = [point["loss"] for point in run.history[-40:] if point["phase"] == "train"]
                progress(run.step, config.steps, describe_progress(latest, numbers))
        return _thin_out(run.history)

    def _train_step(
        self, model: "AutoregressiveModel", run: "TrainingRun", batches: "Iterator[tuple[int, SequenceBatch]]"
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One step; its losses and its other numbers. All that is random in it follows from the seed and the step."""
        import torch

        from models.training import schedule_learning_rate

        config, positions = self._config, 0

        def losses_of(drawn: "tuple[int, SequenceBatch]", place: int) -> "Tensor":
            nonlocal positions
            seed, batch = drawn
            positions += batch.kinds.numel()
            torch.manual_seed(seed)
            losses = model.losses(batch.to(model.token_mean.device))
            return torch.stack([losses.total, *losses])

        rates = {
            name: schedule_learning_rate(getattr(config, name), run.step, config.steps, "constant", config.warmup_steps)
            for name in ("new_learning_rate", "learning_rate")
        }
        model.train()
        losses, numbers = train_step(run, config, batches, losses_of, rates)
        speed = {"positions_per_s": positions * config.processes / numbers["seconds"]}
        return dict(zip(LOSS_NAMES, losses, strict=True)), numbers | speed


def _make_windows(config: TrainAutoregressiveConfig, keyframes: "TokenTable", tokenizer: Any) -> Any:
    from models.training_windows import TrainingWindows, WindowSettings

    settings = {name: getattr(config, name) for name in WindowSettings.__dataclass_fields__}
    return TrainingWindows(keyframes, tokenizer, WindowSettings(**settings))


def _device_of(model: "AutoregressiveModel") -> str:
    return model.token_mean.device.type


def _thin_out(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over at most 200 stretches of steps, then the held-out curve."""
    steps = [point for point in history if point["phase"] == "train"]
    stretch = max(1, -(-len(steps) // HISTORY_POINTS))
    points = []
    for start in range(0, len(steps), stretch):
        part = steps[start : start + stretch]
        means = {name: float(np.mean([point[name] for point in part])) for name in LOSS_NAMES}
        points.append({"phase": "train", "step": part[-1]["step"], **means})
    return points + [point for point in history if point["phase"] == "heldout" and point["loss"] is not None]
