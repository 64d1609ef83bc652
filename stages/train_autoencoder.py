"""Train the diffusion autoencoder: keyframe -> 2 tokens -> keyframe (paper, section 3.2 and appendix A).

Two phases, each with its own pictures, size, schedule and learning rate: one on pictures of many things, one on
whole keyframes. Each begins with the decoder frozen. The image encoder is never trained, so its features and the
latents of every picture, and of its mirror image, are computed once and kept in memory. Then all keyframes are
reconstructed, and it is measured how often a reconstruction lies nearest to its own keyframe.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.errors import MissingInputError, UsageError
from stages.spec import Inputs, Progress, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from torch import Tensor

    from models.autoencoder import Autoencoder
    from models.diffusion import TrainingRun

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class PhaseConfig(BaseModel):
    """One phase of training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Literal["crops", "images", "keyframes"] = Field(
        description="crops: square parts of keyframes; images: a folder of pictures; keyframes: whole keyframes"
    )
    images_dir: Path | None = Field(None, description="the folder, when data is 'images'; searched recursively")
    height_px: int = Field(description="height of the training pictures", gt=0)
    width_px: int = Field(description="width of the training pictures", gt=0)
    steps: int = Field(description="optimizer steps, those of the compressor alone included", ge=0)
    compressor_steps: int = Field(20_000, description="first steps, in which the decoder stays frozen", ge=0)
    batch_size: int = Field(96, description="pictures a step (the paper gives none)", gt=0)
    learning_rate: float = Field(description="AdamW's, at its peak", gt=0)
    schedule: Literal["cosine", "constant"] = Field(description="how the learning rate goes on after the warm-up")
    warmup_steps: int = Field(0, description="steps over which the learning rate rises from zero", ge=0)

    @model_validator(mode="after")
    def _check_images(self) -> "PhaseConfig":
        if (self.data == "images") != (self.images_dir is not None):
            raise ValueError(f"images_dir is {self.images_dir} with data '{self.data}': set both or neither")
        return self


class TrainAutoencoderConfig(StageConfig):
    """Settings of the autoencoder and of its training; defaults follow appendix A where it gives a number."""

    image_phase: PhaseConfig = Field(
        PhaseConfig(data="crops", height_px=768, width_px=768, steps=120_000, learning_rate=1e-4, schedule="cosine"),
        description="first phase, on pictures of many things (crops of keyframes stand in for the image data set)",
    )
    film_phase: PhaseConfig = Field(
        PhaseConfig(
            data="keyframes", height_px=512, width_px=896, steps=120_000, learning_rate=2e-5, schedule="constant"
        ),
        description="second phase, on keyframes; its size is the size of the pictures that the decoder gives",
    )
    crops_per_keyframe: int = Field(1, description="crops taken of each keyframe when data is 'crops'", gt=0)
    noise_offset: float = Field(0.05, description="standard deviation of the noise shared by a channel's positions")
    token_noise: float = Field(
        0.0, description="largest standard deviation of noise on the decoder's tokens, drawn for each picture", ge=0
    )
    average_decay: float = Field(0.9999, description="of the moving average of the weights", ge=0, lt=1)
    gradient_norm: float = Field(1.0, description="gradients are scaled down to this norm", gt=0)
    encoder_height_px: int = Field(224, description="pictures are scaled to this for the image encoder", gt=0)
    encoder_width_px: int = Field(224, description="pictures are scaled to this for the image encoder", gt=0)
    tokens: int = Field(2, description="tokens a picture", gt=0)
    token_dim: int = Field(256, description="width of a token (the paper gives none)", gt=1)
    compressor_width: int = Field(384, description="width of the compressor's transformer blocks", gt=0)
    compressor_heads: int = Field(6, description="attention heads of the compressor", gt=0)
    block_px: int = Field(8, description="side of a latent position in pixels", gt=0)
    luma: int = Field(28, description="cosine coefficients of brightness kept of each block", gt=0)
    chroma: int = Field(10, description="cosine coefficients kept of each colour difference", gt=0)
    flattening: float = Field(0.5, description="how far channels are brought to equal variance, 0 to 1", ge=0, le=1)
    channels: tuple[int, ...] = Field((320, 640, 1280), description="UNet widths, finest resolution first")
    layers: int = Field(2, description="residual blocks at each resolution", gt=0)
    cross_dim: int = Field(2048, description="width of the cross-attention context", gt=0)
    heads: int = Field(20, description="attention heads of the UNet", gt=0)
    norm_groups: int = Field(32, description="groups of the UNet's normalisation", gt=0)
    draft_components: int = Field(
        0, description="principal components of the first guess that a small UNet needs; 0: no guess", ge=0
    )
    draft_width: int = Field(1024, description="hidden width of that guess", gt=0)
    timesteps: int = Field(1000, description="steps of the noise schedule", gt=1)
    prediction: Literal["epsilon", "v_prediction"] = Field("epsilon", description="what the decoder predicts")
    sampling_steps: int = Field(50, description="DDIM steps of the reconstructions that are measured", gt=0)
    sample_keyframes: int = Field(24, description="reconstructions kept to look at", ge=0)
    seed: int = Field(0, description="of weights, order, noise and crops", ge=0)
    checkpoint_every_steps: int = neutral(500, "steps between checkpoints", gt=0)

    @property
    def height_px(self) -> int:
        """Height of the pictures that the decoder gives."""
        return self.film_phase.height_px

    @property
    def width_px(self) -> int:
        """Width of the pictures that the decoder gives."""
        return self.film_phase.width_px

    def weights(self) -> tuple[str, ...]:
        """The image encoder."""
        return ("dinov2_small",)

    @model_validator(mode="after")
    def _check_film_phase(self) -> "TrainAutoencoderConfig":
        if self.film_phase.data != "keyframes":
            raise ValueError(f"film_phase has data '{self.film_phase.data}': it trains on 'keyframes'")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> "TrainAutoencoderConfig":
        for phase, name in ((self.image_phase, "image_phase"), (self.film_phase, "film_phase")):
            if phase.height_px % self.block_px or phase.width_px % self.block_px:
                size = f"{phase.width_px}x{phase.height_px}"
                raise ValueError(f"{name} has pictures of {size}: both must be multiples of block_px {self.block_px}")
        if self.encoder_height_px % 14 or self.encoder_width_px % 14:
            size = f"{self.encoder_width_px}x{self.encoder_height_px}"
            raise ValueError(f"the image encoder's picture is {size}: both sides must be multiples of 14")
        wrong = [width for width in self.channels if width % self.norm_groups or width % self.heads]
        if wrong:
            raise ValueError(
                f"channels {wrong} must be multiples of norm_groups {self.norm_groups} and of heads {self.heads}"
            )
        if self.compressor_width % self.compressor_heads:
            width, heads = self.compressor_width, self.compressor_heads
            raise ValueError(f"compressor_width {width} must be a multiple of compressor_heads {heads}")
        return self


SPEC = StageSpec(
    name="train_autoencoder",
    version=1,
    implementation="stages.train_autoencoder:TrainAutoencoder",
    inputs=("shards",),
    output="autoencoder",
    scope="set",
    cpus=2.0,
    gpus=1.0,
    description="train the diffusion autoencoder, keyframe to 2 tokens and back",
)


class TrainAutoencoder:
    """The job: shards in, a trained autoencoder with its measurements out."""

    def __init__(self, config: TrainAutoencoderConfig, weights_dir: Path | None = None):
        self.config = config
        self.weights_dir = weights_dir

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Train, measure, and write model.safetensors, config.json, history.json, metrics.json, samples.parquet.

        Raises:
            MissingInputError: The shards hold no keyframe of the training split.
            UsageError: The folder of pictures is absent or holds none.
        """
        import torch

        from models.autoencoder import Architecture, Autoencoder, save_autoencoder
        from models.latents import read_keyframes
        from models.reconstructions import measure_reconstructions, write_samples
        from models.samples import read_samples

        samples = list(read_samples(inputs["shards"]))
        training = [sample for sample in samples if sample["json"]["split"] != "test"]
        if not training:
            raise MissingInputError(f"the shards hold {len(samples)} keyframes, none for training: ingest films first")
        torch.manual_seed(self.config.seed)
        model = Autoencoder(Architecture.from_settings(self.config), self.weights_dir)
        progress(0, self.config.image_phase.steps + self.config.film_phase.steps, "measuring features and latents")
        keyframes = read_keyframes((sample["jpg"] for sample in samples), self.config.height_px, self.config.width_px)
        trained = [sample["json"]["split"] != "test" for sample in samples]
        is_training = torch.tensor(trained)
        model.latents.fit(keyframes[is_training])
        films = _prepare(model, keyframes[is_training])
        model.compressor.fit(films[0])
        if model.decoder.draft is not None:
            model.decoder.draft.fit(films[1])
        checkpoint = scratch / "checkpoint.safetensors"
        history = self._train(model, [sample["jpg"] for sample in training], films, checkpoint, progress)
        save_autoencoder(model.eval(), out)
        (out / "history.json").write_text(json.dumps(history) + "\n")
        reconstructions = model.decode(model.encode(keyframes), self.config.sampling_steps, self.config.seed)
        keys = [(sample["json"]["film_id"], sample["json"]["frame_index"]) for sample in samples]
        metrics = measure_reconstructions(model, [film for film, _ in keys], trained, keyframes, reconstructions)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        write_samples(out / "samples.parquet", keys, keyframes, reconstructions, self.config.sample_keyframes)
        return metrics

    def _train(
        self,
        model: "Autoencoder",
        jpegs: list[bytes],
        films: tuple["Tensor", "Tensor"],
        checkpoint: Path,
        progress: Progress,
    ) -> list[dict[str, Any]]:
        """Both phases; `films` are the features and latents of whole keyframes at the second phase's size."""
        from models.diffusion import TrainingRun

        config = self.config
        trained = {n: p for n, p in model.named_parameters() if not n.startswith("encoder.")}
        run = TrainingRun(trained, config.seed, config.average_decay, config.gradient_norm)
        if checkpoint.is_file():
            run.restore(checkpoint)
        total = config.image_phase.steps + config.film_phase.steps
        for number, (name, phase) in enumerate((("images", config.image_phase), ("films", config.film_phase))):
            if number < run.phase or phase.steps == 0:
                continue
            if number > run.phase:
                run.begin_phase(number)
            progress(run.total_steps, total, f"{name}: computing features")
            data = films if phase is config.film_phase else _prepare(model, self._pictures_of(phase, jpegs))
            while run.step < phase.steps:
                loss = self._train_step(model, run, phase, data)
                run.history.append({"phase": name, "step": run.step, "loss": loss})
                progress(run.total_steps, total, f"{name}: loss {loss:.4f}")
                if run.total_steps % config.checkpoint_every_steps == 0 or run.total_steps == total:
                    run.save(checkpoint)
        run.use_averages()
        return run.history

    def _train_step(
        self, model: "Autoencoder", run: "TrainingRun", phase: PhaseConfig, data: tuple["Tensor", "Tensor"]
    ) -> float:

        from models.diffusion import add_token_noise, draw_batch, schedule_learning_rate

        model.decoder.requires_grad_(run.step >= phase.compressor_steps)
        features, latents = data
        batch = draw_batch(len(latents), phase.batch_size, run.step, self.config.seed + run.phase)
        tokens = model.compressor(features[batch])
        tokens = add_token_noise(tokens, self.config.token_noise, run.generator)
        loss = model.schedule.loss(
            lambda noisy, steps: model.decoder(noisy, steps, tokens),
            latents[batch],
            self.config.noise_offset,
            run.generator,
        )
        rate = schedule_learning_rate(phase.learning_rate, run.step, phase.steps, phase.schedule, phase.warmup_steps)
        run.update(loss, rate)
        return loss.item()

    def _pictures_of(self, phase: PhaseConfig, jpegs: list[bytes]) -> "Tensor":
        """The training pictures of a phase, RGB in 0..1 [picture, 3, height, width]."""
        import torch

        from models.latents import cover, crop_randomly, read_picture

        size = (phase.height_px, phase.width_px)
        if phase.data == "crops":
            rng = np.random.default_rng(self.config.seed)
            repeated = (jpeg for jpeg in jpegs for _ in range(self.config.crops_per_keyframe))
            return torch.stack([crop_randomly(read_picture(jpeg), *size, rng) for jpeg in repeated])
        files = (path.read_bytes() for path in _find_pictures(phase.images_dir)) if phase.images_dir else jpegs
        return torch.cat([cover(read_picture(picture)[None], *size) for picture in files])


def _prepare(model: "Autoencoder", images: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Features and latents of pictures, followed by those of their mirror images."""
    import torch

    images = torch.cat([images, images.flip(3)])
    return model.extract_features(images), model.latents.encode(images)


def _find_pictures(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise UsageError(f"images_dir {folder} holds no picture: expected {', '.join(sorted(PICTURE_SUFFIXES))} files")
    return found
