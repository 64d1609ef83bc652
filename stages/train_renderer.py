"""Train the ID-preserving decoder: tokens, sentences and faces -> keyframe (paper, section 3.4 and appendix A).

Starts from the trained decoder of the autoencoder. Its cross-attention context becomes the compressed tokens, up to
15 sentence embeddings and up to 5 face embeddings, the latter two through two-layer MLPs. Each entry is masked with
probability 0.2, so that the decoder learns to use all of them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq
from pydantic import Field

from stages.errors import MissingInputError
from stages.spec import Inputs, Progress, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from torch import Tensor

    from models.diffusion import TrainingRun
    from models.renderer import Renderer
    from models.token_table import TokenTable


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
    sampling_steps: int = Field(50, description="DDIM steps of the reconstructions that are measured", gt=0)
    sample_keyframes: int = Field(24, description="reconstructions kept to look at", ge=0)
    seed: int = Field(0, description="of new weights, order, noise and masks", ge=0)
    checkpoint_every_steps: int = neutral(500, "steps between checkpoints", gt=0)

    def weights(self) -> tuple[str, ...]:
        """The image encoder, which measures the reconstructions."""
        return ("dinov2_small",)


SPEC = StageSpec(
    name="train_renderer",
    version=1,
    implementation="stages.train_renderer:TrainRenderer",
    inputs=("shards", "tokens", "autoencoder"),
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
            MissingInputError: A keyframe of the shards has no tokens, or none is of the training split.
        """
        import torch

        from models.autoencoder import load_autoencoder
        from models.latents import read_keyframes
        from models.reconstructions import measure_reconstructions, write_samples
        from models.renderer import Renderer, save_renderer
        from models.token_table import TokenTable

        table_path = inputs["tokens"][0]
        table = TokenTable(table_path)
        keys, jpegs = _match_keyframes(inputs["shards"], table_path)
        if not table.split_rows("train"):
            raise MissingInputError(f"{table_path} holds {len(table)} keyframes, none for training: ingest films first")
        torch.manual_seed(self.config.seed)
        autoencoder = load_autoencoder(inputs["autoencoder"], self.weights_dir)
        widths = table.widths
        max_faces = self.config.max_faces if _has_faces(table) else 0
        model = Renderer(autoencoder, widths["text_width"], widths["face_width"], self.config.max_sentences, max_faces)
        size = model.autoencoder.architecture
        keyframes = read_keyframes(jpegs, size.height_px, size.width_px)
        history = self._train(model, table, keyframes, scratch / "checkpoint.safetensors", progress)
        save_renderer(model.eval(), out)
        (out / "history.json").write_text(json.dumps(history) + "\n")
        made = model.decode(*_conditions(model, table, False), self.config.sampling_steps, self.config.seed)
        training = set(table.split_rows("train"))
        trained = [row in training for row in range(len(table))]
        metrics = measure_reconstructions(autoencoder, table.films, trained, keyframes, made)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        write_samples(out / "samples.parquet", keys, keyframes, made, self.config.sample_keyframes)
        return metrics

    def _train(
        self, model: "Renderer", table: "TokenTable", keyframes: "Tensor", checkpoint: Path, progress: Progress
    ) -> list[dict[str, Any]]:
        import torch

        from models.diffusion import TrainingRun
        from models.renderer import SAVED

        config = self.config
        trained = {name: p for name, p in model.named_parameters() if name.startswith(SAVED)}
        run = TrainingRun(trained, config.seed, config.average_decay, config.gradient_norm)
        if checkpoint.is_file():
            run.restore(checkpoint)
        rows = torch.tensor(table.split_rows("train"))
        images = keyframes[rows]
        latents = model.autoencoder.latents.encode(torch.cat([images, images.flip(3)]))
        both = zip(_conditions(model, table, False), _conditions(model, table, True), strict=True)
        conditions = [torch.cat([plain[rows], mirrored[rows]]) for plain, mirrored in both]
        while run.step < config.steps:
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

        from models.diffusion import add_token_noise, draw_batch, schedule_learning_rate

        config = self.config
        batch = draw_batch(len(latents), config.batch_size, run.step, config.seed)
        tokens, sentences, faces = (condition[batch] for condition in conditions)
        tokens = add_token_noise(tokens, config.token_noise, run.generator)
        entries = tokens.shape[1] + sentences.shape[1] + faces.shape[1]
        keep = torch.rand((len(batch), entries), generator=run.generator) >= config.mask_probability
        loss = model.autoencoder.schedule.loss(
            lambda noisy, steps: model(noisy, steps, tokens, sentences, faces, keep),
            latents[batch],
            config.noise_offset,
            run.generator,
        )
        rate = schedule_learning_rate(
            config.learning_rate, run.step, config.steps, config.schedule, config.warmup_steps
        )
        run.update(loss, rate)
        return loss.item()


def _match_keyframes(shards: list[Path], table_path: Path) -> tuple[list[tuple[str, int]], list[bytes]]:
    """Film and frame index of each row of the table, and the row's picture as JPEG."""
    from models.samples import read_samples

    columns = pq.read_table(table_path, columns=["film_id", "frame_index"]).to_pydict()
    keys = list(zip(columns["film_id"], columns["frame_index"], strict=True))
    samples = read_samples([path for path in shards if path.suffix == ".tar"])
    jpegs = {(sample["json"]["film_id"], sample["json"]["frame_index"]): sample["jpg"] for sample in samples}
    if different := sorted(set(keys) ^ jpegs.keys()):
        film, frame = different[0]
        raise MissingInputError(
            f"tokens and shards differ in {len(different)} keyframes, first frame {frame} of {film}: "
            "run the tokenize stage on these shards again"
        )
    return keys, [jpegs[key] for key in keys]


def _has_faces(table: "TokenTable") -> bool:
    return any(_faces_of(table, row) for row in range(len(table)))


def _faces_of(table: "TokenTable", row: int) -> list[Any]:
    """The keyframe's own face of each of its characters that has one, in the script's order."""
    characters = [character.character_index for character in table.script(row).characters]
    places = [
        next((place for r, place in table.faces_of(table.films[row], character) if r == row), None)
        for character in characters
        if character is not None
    ]
    return [table.face(row, place) for place in places if place is not None]


def _conditions(model: "Renderer", table: "TokenTable", mirrored: bool) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Tokens, padded sentences and padded faces of every row of the table or of its mirror image."""
    import numpy as np
    import torch

    rows = range(len(table))
    tokens = torch.from_numpy(np.stack([table.tokens(row, mirrored) for row in rows]).astype(np.float32))
    sentences = model.pad_sentences([table.sentences(row, mirrored) for row in rows])
    own = [np.array(_faces_of(table, row), np.float32).reshape(-1, table.widths["face_width"]) for row in rows]
    faces = model.pad_faces(own)
    return tokens, sentences, faces
