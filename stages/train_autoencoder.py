"""Train the diffusion autoencoder: keyframe -> 2 tokens -> keyframe (paper, section 3.2 and appendix A).

Two phases, each with its own pictures, schedule and learning rate: one on square pictures of many things, one on whole
keyframes. Each begins with the decoder frozen. The frozen models' part is read from the features stage. Then keyframes
are reconstructed, and it is measured how often a reconstruction lies nearest to its own keyframe.
"""

import hashlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models import weights
from stages.errors import ComputationError, MissingInputError, UsageError
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

    from models.autoencoder import Autoencoder
    from models.feature_table import FeatureSpace, FeatureTable
    from models.training import TrainingRun

log = logging.getLogger(__name__)

SMALL_DECODER = (
    "flattening", "channels", "layers", "cross_dim", "heads", "norm_groups", "draft_components", "draft_width"
)  # fmt: skip
IMAGES_AT_ONCE = 16
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class PhaseConfig(BaseModel):
    """One phase of training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Literal["crops", "images", "keyframes"] = Field(
        description="crops: square parts of keyframes; images: a folder of pictures; keyframes: whole keyframes"
    )
    images_dir: Path | None = Field(None, description="the folder, when data is 'images'; searched recursively")
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


class TrainAutoencoderConfig(TrainerConfig):
    """Settings of the autoencoder and of its training; defaults follow appendix A where it gives a number."""

    image_phase: PhaseConfig = Field(
        PhaseConfig(data="crops", steps=120_000, learning_rate=1e-4, schedule="cosine"),
        description="first phase, on pictures of many things (crops of keyframes stand in for the image data set)",
    )
    film_phase: PhaseConfig = Field(
        PhaseConfig(data="keyframes", steps=120_000, learning_rate=2e-5, schedule="constant"),
        description="second phase, on whole keyframes",
    )
    noise_offset: float = Field(0.05, description="standard deviation of the noise shared by a channel's positions")
    token_noise: float = Field(
        0.0, description="largest standard deviation of noise on the decoder's tokens, drawn for each picture", ge=0
    )
    average_decay: float = Field(0.9999, description="of the moving average of the weights", ge=0, lt=1)
    gradient_norm: float = Field(1.0, description="gradients are scaled down to this norm", gt=0)
    tokens: int = Field(2, description="tokens a picture", gt=0)
    token_dim: int = Field(256, description="width of a token (the paper gives none)", gt=1)
    compressor_width: int = Field(384, description="width of the compressor's transformer blocks", gt=0)
    compressor_heads: int = Field(6, description="attention heads of the compressor", gt=0)
    pretrained: str | None = Field(
        "sdxl",
        description="SDXL, whose UNet is trained further: name or folder; null for a small UNet of the sizes below",
    )
    flattening: float = Field(0.5, description="how far cosine channels are brought to equal variance", ge=0, le=1)
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
    measured_keyframes: int = Field(1000, description="keyframes reconstructed and measured, evenly chosen", gt=0)
    sampling_steps: int = Field(50, description="DDIM steps of the reconstructions that are measured", gt=0)
    sample_keyframes: int = Field(24, description="reconstructions kept to look at", ge=0)
    seed: int = Field(0, description="of weights, order, noise and crops", ge=0)
    checkpoint_every_steps: int = neutral(500, "steps between checkpoints", gt=0)

    def is_heavy(self) -> bool:
        """Whether the decoder is SDXL's."""
        return self.pretrained is not None

    def weights(self) -> tuple[str, ...]:
        """SDXL, where the decoder starts from it."""
        return () if self.pretrained is None else (self.pretrained,)

    def recipe(self) -> dict[str, Any]:
        """Weights and pictures enter by what they are, not by where they lie."""
        values = super().recipe()
        if folder := self.image_phase.images_dir:
            values["image_phase"] |= {"images_dir": _digest_listing(folder)}
        if self.pretrained is None:
            return values
        values = {name: value for name, value in values.items() if name not in SMALL_DECODER}
        return weights.without_places(values, "pretrained")

    @model_validator(mode="after")
    def _check_film_phase(self) -> "TrainAutoencoderConfig":
        if self.film_phase.data != "keyframes":
            raise ValueError(f"film_phase has data '{self.film_phase.data}': it trains on 'keyframes'")
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> "TrainAutoencoderConfig":
        for name, phase in (("image_phase", self.image_phase), ("film_phase", self.film_phase)):
            self.check_parts(f"{name}.batch_size", phase.batch_size)
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> "TrainAutoencoderConfig":
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
    version=2,
    implementation="stages.train_autoencoder:TrainAutoencoder",
    inputs=("shards", "features"),
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
        from models.feature_table import FeatureTable, feature_folders

        films = FeatureTable(feature_folders(inputs["features"]), "keyframes")
        if not films.training_views():
            raise MissingInputError(
                f"the shards hold {len(films) // 2} keyframes, none for training: ingest films first"
            )
        for phase in (self.config.image_phase, self.config.film_phase):
            if phase.steps:  # what is missing is told before anything starts
                self._open_table(phase, feature_folders(inputs["features"]), films, scratch)
        body = partial(self._run, inputs, out, scratch)
        return train_in_processes(self.config, SPEC.cpus, body, scratch, progress)

    def _run(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Training, in each process that takes part; the first one then writes everything."""
        import torch

        from models.autoencoder import save_autoencoder, sharded_parts
        from models.feature_table import FeatureTable, feature_folders
        from models.pretrained import choose_device
        from models.processes import gather_weights, place_model, process_index

        films = FeatureTable(feature_folders(inputs["features"]), "keyframes")
        progress(0, self.config.image_phase.steps + self.config.film_phase.steps, "measuring features and latents")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = place_model(
                partial(self._build, films),
                lambda model: sharded_parts(model.decoder),
                ("loss",),
                choose_device(None),
                self.config.precision,
            )
        if self.config.gradient_checkpointing:
            model.decoder.unet.enable_gradient_checkpointing()
        history = self._train(model, feature_folders(inputs["features"]), films, scratch, progress)
        trained = gather_weights(model)
        if process_index() > 0:
            return {}
        save_autoencoder(model, out, trained)
        del model, trained
        (out / "history.json").write_text(json.dumps(history) + "\n")
        metrics = self._measure(films, inputs["shards"], out)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        return metrics

    def _build(self, films: "FeatureTable", with_weights: bool) -> "Autoencoder":
        from models.autoencoder import Autoencoder
        from models.autoencoder_sizes import Architecture
        from models.pretrained import choose_device

        architecture = Architecture.from_settings(self.config, films.space)
        device = choose_device(None)
        model = Autoencoder(architecture, self.weights_dir, device, trained=not with_weights)
        if with_weights:
            model.to(device).fit(films)
        return model

    def _train(
        self, model: "Autoencoder", folders: list[Path], films: "FeatureTable", scratch: Path, progress: Progress
    ) -> list[dict[str, Any]]:
        """Both phases; `films` are whole keyframes."""
        from models.loader import StepBatches, load_batches
        from models.training import TrainingRun

        config, checkpoints = self.config, scratch / "checkpoints"
        run = TrainingRun(
            dict(model.named_parameters()), seed=config.seed, average_decay=config.average_decay,
            largest_norm=config.gradient_norm, betas=(0.9, 0.99), model=model,
        )  # fmt: skip
        run.restore(checkpoints)
        total = config.image_phase.steps + config.film_phase.steps
        with open_training_log(config, scratch, run.total_steps) as write:
            for number, (name, phase) in enumerate((("images", config.image_phase), ("films", config.film_phase))):
                if number < run.phase or phase.steps == 0:
                    continue
                if number > run.phase:
                    run.begin_phase(number)
                progress(run.total_steps, total, f"{name}: opening features")
                table, steps = self._open_table(phase, folders, films, scratch), range(run.step, phase.steps)
                drawn = (table.training_views(), phase.batch_size, steps, config.seed + run.phase, config.micro_batches)
                batches = load_batches(table, StepBatches(*drawn), config.loader_workers)
                while run.step < phase.steps:
                    loss, numbers = self._train_step(model, run, phase, batches)
                    run.history.append({"phase": name, "step": run.step, "loss": loss})
                    write(run.total_steps, numbers | {"loss": loss})
                    latest = [point["loss"] for point in run.history[-20:]]
                    progress(run.total_steps, total, f"{name}: {describe_progress(latest, numbers)}")
                    if run.total_steps % config.checkpoint_every_steps == 0 or run.total_steps == total:
                        run.save(checkpoints)
        run.use_averages()
        return run.history

    def _train_step(
        self, model: "Autoencoder", run: "TrainingRun", phase: PhaseConfig, batches: "Iterator[Any]"
    ) -> tuple[float, dict[str, float]]:
        from models.processes import autocast
        from models.training import schedule_learning_rate

        config, device = self.config, model.device
        model.decoder.requires_grad_(run.step >= phase.compressor_steps)

        def losses_of(batch: "tuple[Tensor, Tensor]", place: int) -> "Tensor":
            features, latents = (part.to(device).float() for part in batch)
            generator = generator_of(config.seed, run.phase, run.step, place)
            with autocast(device, config.precision):
                loss = model.loss(features, latents, config.noise_offset, config.token_noise, generator)
            return loss[None]

        rate = schedule_learning_rate(phase.learning_rate, run.step, phase.steps, phase.schedule, phase.warmup_steps)
        (loss,), numbers = train_step(run, config, batches, losses_of, {"learning_rate": rate})
        return loss, numbers

    def _open_table(
        self, phase: PhaseConfig, folders: list[Path], films: "FeatureTable", scratch: Path
    ) -> "FeatureTable":
        """The pictures of a phase.

        Raises:
            MissingInputError: The phase wants crops and the features hold none.
            UsageError: The folder of pictures is absent or holds none.
        """
        from models.feature_table import FeatureTable

        if phase.data == "keyframes":
            return films
        if phase.images_dir is not None:
            return FeatureTable([self._prepare_images(films.space, phase.images_dir, scratch / "images")], "crops")
        crops = FeatureTable(folders, "crops")
        if not len(crops):
            raise MissingInputError("there are no crops to train on: set features.crops_per_keyframe to at least 1")
        return crops

    def _prepare_images(self, space: "FeatureSpace", images: Path, folder: Path) -> Path:
        """Features and latents of a folder of pictures; kept in the scratch folder, for a killed run to go on with.

        Pictures that cannot be read are told, and left out.
        """
        import torch

        from models.feature_table import FeatureWriter, FrozenModels, write_space
        from models.latents import cover, load_picture
        from models.pictures import PictureError
        from models.pretrained import choose_device

        if (folder / "config.json").is_file():
            return folder
        pictures = _find_pictures(images)
        folder.mkdir(parents=True, exist_ok=True)
        frozen = FrozenModels(space, self.weights_dir, choose_device(None))
        writer = FeatureWriter(frozen, folder, "crops", len(pictures), (space.crop_px, space.crop_px))
        splits, batch = ["train"] * len(pictures), []
        for place, path in enumerate(pictures):
            try:
                batch.append(cover(load_picture(path)[None], space.crop_px, space.crop_px))
            except PictureError as error:
                log.warning("a picture is left out: %s", error)
                splits[place] = "test"
            if batch and (len(batch) == IMAGES_AT_ONCE or splits[place] == "test" or place == len(pictures) - 1):
                writer.write(torch.cat(batch))
                batch = []
            if splits[place] == "test":
                writer.leave_out()
        if "train" not in splits:
            raise ComputationError(f"none of the {len(pictures)} pictures in {images} can be read: get them again")
        keys = [{"film_id": p.name, "frame_index": 0, "split": s} for p, s in zip(pictures, splits, strict=True)]
        write_space(space, keys, folder)
        return folder

    def _measure(self, films: "FeatureTable", shards: list[Path], out: Path) -> dict[str, Any]:
        """Reconstruct keyframes, write samples.parquet, and tell how near they lie to the originals."""
        import torch

        from models.autoencoder import load_autoencoder
        from models.feature_table import VIEWS
        from models.pretrained import choose_device
        from models.reconstructions import choose_films, measure_reconstructions, read_chosen, write_samples

        written = [out / "model.safetensors", out / "config.json"]
        model = load_autoencoder(written, self.weights_dir, choose_device(None))
        known = films.read_keys()
        rows = choose_films([film for film, _, _ in known], self.config.measured_keyframes)
        keys = [known[row][:2] for row in rows]
        keyframes = read_chosen(shards, keys, films.space.height_px, films.space.width_px)
        with torch.no_grad():
            features = films.features(VIEWS * row for row in rows)
            tokens = torch.cat([model.compressor(part.to(model.device)) for part in features.split(16)])
        made = model.decode(tokens, self.config.sampling_steps, self.config.seed, precision=self.config.precision)
        trained = [known[row][2] != "test" for row in rows]
        write_samples(out / "samples.parquet", keys, keyframes, made, self.config.sample_keyframes)
        return measure_reconstructions(model, [film for film, _ in keys], trained, keyframes, made)


def _digest_listing(folder: Path) -> str:
    """What tells a folder of pictures apart: their names and sizes; reading millions of them would take hours."""
    listing = "".join(f"{path.relative_to(folder)} {path.stat().st_size};" for path in _find_pictures(folder))
    return hashlib.sha256(listing.encode()).hexdigest()


def _find_pictures(folder: Path) -> list[Path]:
    """Those below a folder, in order.

    Raises:
        UsageError: There is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise UsageError(f"images_dir {folder} holds no picture: expected {', '.join(sorted(PICTURE_SUFFIXES))} files")
    return found
