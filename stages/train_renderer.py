"""Train the ID-preserving decoder: tokens, sentences and faces -> keyframe (paper, section 3.4 and appendix A).

Starts from the trained decoder of the autoencoder. Its cross-attention context becomes the compressed tokens, up to
15 sentence embeddings and up to 5 face embeddings, the latter two through two-layer MLPs. Each entry is masked with
probability 0.2, so that the decoder learns to use all of them.
"""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from stages.errors import MissingInputError
from stages.spec import Inputs, Progress, StageSpec, neutral
from stages.trainer import (
    TrainerConfig,
    describe_progress,
    generator_of,
    open_training_log,
    train_in_processes,
    train_step,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from models.renderer import Renderer
    from models.renderer_data import RendererViews
    from models.training import TrainingRun


class TrainRendererConfig(TrainerConfig):
    """Settings of the ID-preserving decoder; the paper gives no optimizer settings for it."""

    max_sentences: int = Field(15, description="sentences a picture takes, in the script's order", ge=1)
    max_faces: int = Field(5, description="faces a picture takes, in the script's order of characters", ge=1)
    mask_probability: float = Field(0.2, description="share of context entries masked in training", ge=0, lt=1)
    steps: int = Field(60_000, description="optimizer steps", ge=0)
    batch_size: int = Field(96, description="pictures a step", gt=0)
    learning_rate: float = Field(2e-5, description="AdamW's, at its peak", gt=0)
    schedule: Literal["cosine", "constant"] = Field("constant", description="how the learning rate goes on")
    warmup_steps: int = Field(0, description="steps over which the learning rate rises from zero", ge=0)
    noise_offset: float = Field(0.05, description="standard deviation of the noise shared by a channel's positions")
    token_noise: float = Field(
        0.0, description="largest standard deviation of noise on the tokens, drawn for each picture", ge=0
    )
    average_decay: float = Field(0.9999, description="of the moving average of the weights", ge=0, lt=1)
    gradient_norm: float = Field(1.0, description="gradients are scaled down to this norm", gt=0)
    measured_keyframes: int = Field(1000, description="keyframes reconstructed and measured, evenly chosen", gt=0)
    sampling_steps: int = Field(50, description="DDIM steps of the reconstructions that are measured", gt=0)
    sample_keyframes: int = Field(24, description="reconstructions kept to look at", ge=0)
    seed: int = Field(0, description="of new weights, order, noise and masks", ge=0)
    checkpoint_every_steps: int = neutral(500, "steps between checkpoints", gt=0)

    @model_validator(mode="after")
    def _check_batch(self) -> "TrainRendererConfig":
        self.check_parts("batch_size", self.batch_size)
        return self


SPEC = StageSpec(
    name="train_renderer",
    version=2,
    implementation="stages.train_renderer:TrainRenderer",
    inputs=("shards", "features", "tokens", "autoencoder"),
    output="renderer",
    scope="set",
    cpus=2.0,
    gpus=1.0,
    description="train the ID-preserving decoder on tokens, sentences and faces",
)


class TrainRenderer:
    """The job: shards, tokens and an autoencoder in, a trained renderer with its measurements out."""

    def __init__(self, config: TrainRendererConfig, weights_dir: Path | None = None):
        self.config = config
        self.weights_dir = weights_dir

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Train, measure, and write model.safetensors, config.json, history.json, metrics.json, samples.parquet.

        Raises:
            MissingInputError: A keyframe has tokens and no features, or none is of the training split.
        """
        self._open_views(inputs)
        body = partial(self._run, inputs, out, scratch)
        return train_in_processes(self.config, SPEC.cpus, body, scratch, progress)

    def _open_views(self, inputs: Inputs) -> "RendererViews":
        from models.feature_table import feature_folders
        from models.renderer_data import RendererDataError, RendererViews

        features = feature_folders(inputs["features"])
        try:
            return RendererViews(inputs["tokens"][0].parent, features, self.config.max_sentences, self.config.max_faces)
        except RendererDataError as error:
            raise MissingInputError(str(error)) from None

    def _run(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Training, in each process that takes part; the first one then writes everything."""
        import torch

        from models.autoencoder import sharded_parts
        from models.pretrained import choose_device
        from models.processes import gather_weights, place_model, process_index
        from models.renderer import save_renderer

        views = self._open_views(inputs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = place_model(
                partial(self._build, inputs["autoencoder"], views.sizes),
                lambda model: sharded_parts(model.autoencoder.decoder),
                ("loss",),
                choose_device(None),
                self.config.precision,
            )
        if self.config.gradient_checkpointing:
            model.autoencoder.decoder.unet.enable_gradient_checkpointing()
        history = self._train(model, views, scratch, progress)
        trained = gather_weights(model)
        if process_index() > 0:
            return {}
        save_renderer(model, out, trained)
        del model, trained
        (out / "history.json").write_text(json.dumps(history) + "\n")
        metrics = self._measure(inputs, views, out)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        return metrics

    def _build(self, autoencoder: list[Path], sizes: dict[str, int], with_weights: bool) -> "Renderer":
        from models.autoencoder import Autoencoder, load_autoencoder, read_architecture
        from models.pretrained import choose_device
        from models.renderer import Renderer

        if with_weights:
            return Renderer(load_autoencoder(autoencoder, self.weights_dir, choose_device(None)), **sizes)
        architecture = read_architecture(next(path for path in autoencoder if path.name == "config.json"))
        return Renderer(Autoencoder(architecture, self.weights_dir, choose_device(None), trained=True), **sizes)

    def _train(
        self, model: "Renderer", views: "RendererViews", scratch: Path, progress: Progress
    ) -> list[dict[str, Any]]:
        from models.loader import StepBatches, load_batches
        from models.renderer import SAVED
        from models.training import TrainingRun

        config, checkpoints = self.config, scratch / "checkpoints"
        trained = {name: p for name, p in model.named_parameters() if name.startswith(SAVED)}
        run = TrainingRun(
            trained, seed=config.seed, average_decay=config.average_decay, largest_norm=config.gradient_norm,
            betas=(0.9, 0.99), model=model,
        )  # fmt: skip
        run.restore(checkpoints)
        steps = range(run.step, config.steps)
        drawn = StepBatches(views.training_views(), config.batch_size, steps, config.seed, config.micro_batches)
        batches = load_batches(views, drawn, config.loader_workers)
        with open_training_log(config, scratch, run.step) as write:
            while run.step < config.steps:
                loss, numbers = self._train_step(model, run, batches)
                run.history.append({"phase": "renderer", "step": run.step, "loss": loss})
                write(run.step, numbers | {"loss": loss})
                latest = [point["loss"] for point in run.history[-20:]]
                progress(run.step, config.steps, describe_progress(latest, numbers))
                if run.step % config.checkpoint_every_steps == 0 or run.step == config.steps:
                    run.save(checkpoints)
        run.use_averages()
        return run.history

    def _train_step(
        self, model: "Renderer", run: "TrainingRun", batches: "Iterator[Any]"
    ) -> tuple[float, dict[str, float]]:
        from models.processes import autocast
        from models.training import schedule_learning_rate

        config, device = self.config, model.autoencoder.device

        def losses_of(batch: "list[Tensor]", place: int) -> "Tensor":
            noises = (config.mask_probability, config.noise_offset, config.token_noise)
            generator = generator_of(config.seed, run.step, place)
            with autocast(device, config.precision):
                return model.loss(*(part.to(device) for part in batch), *noises, generator)[None]

        rate = schedule_learning_rate(
            config.learning_rate, run.step, config.steps, config.schedule, config.warmup_steps
        )
        (loss,), numbers = train_step(run, config, batches, losses_of, {"learning_rate": rate})
        return loss, numbers

    def _measure(self, inputs: Inputs, views: "RendererViews", out: Path) -> dict[str, Any]:
        """Render keyframes, write samples.parquet, and tell how near they lie to the originals."""
        import torch

        from models.autoencoder import load_autoencoder
        from models.feature_table import VIEWS
        from models.pretrained import choose_device
        from models.reconstructions import choose_films, measure_reconstructions, read_chosen, write_samples
        from models.renderer import load_renderer

        autoencoder = load_autoencoder(inputs["autoencoder"], self.weights_dir, choose_device(None))
        model = load_renderer([out / "model.safetensors", out / "config.json"], autoencoder)
        table, device = views.tokens, autoencoder.device
        rows = choose_films(table.films, self.config.measured_keyframes)
        keys = [table.key(row) for row in rows]
        conditions = zip(*(views[VIEWS * row][1:] for row in rows), strict=True)
        stacked = [torch.stack(values).to(device) for values in conditions]
        sampling = (self.config.sampling_steps, self.config.seed)
        batches = model.decode(*stacked, *sampling, precision=self.config.precision)
        made = torch.cat([pictures for _, pictures in batches])
        size = autoencoder.architecture
        keyframes = read_chosen(inputs["shards"], keys, size.height_px, size.width_px)
        training = set(table.split_rows("train"))
        trained = [row in training for row in rows]
        write_samples(out / "samples.parquet", keys, keyframes, made, self.config.sample_keyframes)
        return measure_reconstructions(autoencoder, [film for film, _ in keys], trained, keyframes, made)
