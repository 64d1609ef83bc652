"""Train the ID-preserving decoder: tokens, sentences and faces -> keyframe (paper, section 3.4 and appendix A).

Starts from the trained decoder of the autoencoder. Its cross-attention context becomes the compressed tokens, up to
15 sentence embeddings and up to 5 face embeddings, the latter two through two-layer MLPs. Each entry is masked with
probability 0.2, so that the decoder learns to use all of them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.errors import MissingInputError
from stages.spec import Inputs, Progress, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from torch import Tensor

    from models.diffusion import TrainingRun
    from models.renderer import Renderer
    from models.renderer_data import RendererViews


class TrainRendererConfig(StageConfig):
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
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the networks' arithmetic; weights and optimizer are float32 either way"
    )
    measured_keyframes: int = Field(1000, description="keyframes reconstructed and measured, evenly chosen", gt=0)
    sampling_steps: int = Field(50, description="DDIM steps of the reconstructions that are measured", gt=0)
    sample_keyframes: int = Field(24, description="reconstructions kept to look at", ge=0)
    seed: int = Field(0, description="of new weights, order, noise and masks", ge=0)
    gradient_checkpointing: bool = neutral(False, "compute activations twice instead of keeping them")
    loader_workers: int = neutral(0, "processes that read batches ahead; 0 reads between the steps", ge=0)
    checkpoint_every_steps: int = neutral(500, "steps between checkpoints", gt=0)


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
        import torch

        from models.autoencoder import load_autoencoder
        from models.pretrained import choose_device
        from models.renderer import Renderer, save_renderer
        from models.renderer_data import RendererDataError, RendererViews

        torch.manual_seed(self.config.seed)
        autoencoder = load_autoencoder(inputs["autoencoder"], self.weights_dir, choose_device(None))
        features = sorted({path.parent for path in inputs["features"]})
        try:
            views = RendererViews(inputs["tokens"][0], features, self.config.max_sentences, self.config.max_faces)
        except RendererDataError as error:
            raise MissingInputError(str(error)) from None
        model = Renderer(autoencoder, **views.sizes).to(autoencoder.device)
        history = self._train(model, views, scratch / "checkpoint.safetensors", progress)
        save_renderer(model.eval(), out)
        (out / "history.json").write_text(json.dumps(history) + "\n")
        metrics = self._measure(model, views, inputs["shards"], out)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        return metrics

    def _train(
        self, model: "Renderer", views: "RendererViews", checkpoint: Path, progress: Progress
    ) -> list[dict[str, Any]]:
        from models.diffusion import TrainingRun
        from models.loader import StepBatches, load_batches
        from models.renderer import SAVED

        config = self.config
        if config.gradient_checkpointing:
            model.autoencoder.decoder.unet.enable_gradient_checkpointing()
        trained = {name: p for name, p in model.named_parameters() if name.startswith(SAVED)}
        run = TrainingRun(trained, config.seed, config.average_decay, config.gradient_norm)
        if checkpoint.is_file():
            run.restore(checkpoint)
        batches = StepBatches(views.training_views(), config.batch_size, range(run.step, config.steps), config.seed)
        for latents, *conditions in load_batches(views, batches, config.loader_workers):
            loss = self._train_step(model, run, latents, conditions)
            run.history.append({"phase": "renderer", "step": run.step, "loss": loss})
            progress(run.step, config.steps, f"loss {loss:.4f}")
            if run.step % config.checkpoint_every_steps == 0 or run.step == config.steps:
                run.save(checkpoint)
        run.use_averages()
        return run.history

    def _train_step(
        self, model: "Renderer", run: "TrainingRun", latents: "Tensor", conditions: list["Tensor"]
    ) -> float:
        import torch

        from models.diffusion import add_token_noise, schedule_learning_rate

        config, autoencoder = self.config, model.autoencoder
        device = autoencoder.device
        latents = autoencoder.latents.normalize(latents.to(device).float())
        tokens, sentences, faces = (condition.to(device) for condition in conditions)
        tokens = add_token_noise(tokens, config.token_noise, run.generator)
        entries = tokens.shape[1] + sentences.shape[1] + faces.shape[1]
        keep = torch.rand((len(latents), entries), generator=run.generator) >= config.mask_probability
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = autoencoder.schedule.loss(
                lambda noisy, steps: model(noisy, steps, tokens, sentences, faces, keep.to(device)),
                latents,
                config.noise_offset,
                run.generator,
            )
        rate = schedule_learning_rate(
            config.learning_rate, run.step, config.steps, config.schedule, config.warmup_steps
        )
        run.update(loss, rate)
        return loss.item()

    def _measure(self, model: "Renderer", views: "RendererViews", shards: list[Path], out: Path) -> dict[str, Any]:
        """Render keyframes, write samples.parquet, and tell how near they lie to the originals."""
        import torch

        from models.feature_table import VIEWS
        from models.reconstructions import choose_evenly, measure_reconstructions, read_chosen, write_samples

        table, device = views.tokens, model.autoencoder.device
        rows = choose_evenly(len(table), self.config.measured_keyframes)
        keys = [table.key(row) for row in rows]
        conditions = zip(*(views[VIEWS * row][1:] for row in rows), strict=True)
        stacked = [torch.stack(values).to(device) for values in conditions]
        made = model.decode(*stacked, self.config.sampling_steps, self.config.seed).cpu()
        size = model.autoencoder.architecture
        keyframes = read_chosen(shards, keys, size.height_px, size.width_px)
        training = set(table.split_rows("train"))
        trained = [row in training for row in rows]
        write_samples(out / "samples.parquet", keys, keyframes, made, self.config.sample_keyframes)
        return measure_reconstructions(model.autoencoder, [film for film, _ in keys], trained, keyframes, made)
