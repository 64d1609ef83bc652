"""Tokens, sentences and faces of a dreamed story -> pictures (paper, section 3.4), by the ID-preserving decoder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from stages.errors import MissingInputError, UsageError
from stages.spec import Inputs, Progress, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from models.picture_folder import PictureFolder
    from models.renderer import Renderer


class RenderConfig(StageConfig):
    """Settings of rendering."""

    sampling_steps: int = Field(50, description="denoising steps a picture", gt=0)
    scheduler: str = Field(
        "DDIMScheduler",
        description="class of diffusers that takes the steps, such as DPMSolverMultistepScheduler or "
        "EulerAncestralDiscreteScheduler; one that does not fit the model is refused with those that do",
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the denoiser")
    seed: int = Field(0, description="of the starting noise", ge=0)
    jpeg_quality: int = Field(95, description="of the pictures", ge=1, le=100)
    batch_pictures: int = neutral(16, "pictures made at once", gt=0)


ROW_GROUP = 16
PICTURES_SCHEMA = pa.schema(
    [
        ("frame_index", pa.int64()),
        ("shot_index", pa.int32()),
        ("script", pa.string()),
        ("jpeg", pa.binary()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
    ]
)

SPEC = StageSpec(
    name="render",
    version=1,
    implementation="stages.render:Render",
    inputs=("dream", "renderer", "autoencoder"),
    output="pictures",
    scope="set",
    cpus=2.0,
    gpus=1.0,
    description="dreamed tokens to pictures, with sentences and faces",
)


class Render:
    """The job: dream.parquet in, pictures.parquet out."""

    def __init__(self, config: RenderConfig, weights_dir: Path | None = None):
        self.config = config
        self.weights_dir = weights_dir

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Render every frame, in order, and write pictures.parquet.

        Raises:
            MissingInputError: The dream has no frame, or its numbers do not fit the renderer.
            UsageError: The scheduler cannot sample from the renderer.
        """
        from models.autoencoder import load_autoencoder
        from models.picture_folder import PictureFolder
        from models.pretrained import choose_device
        from models.renderer import load_renderer

        frames = _read_frames(inputs["dream"])
        autoencoder = load_autoencoder(inputs["autoencoder"], self.weights_dir, choose_device(None))
        renderer = load_renderer(inputs["renderer"], autoencoder)
        architecture, sizes = autoencoder.architecture, renderer.sizes
        tokens = _shape(frames, "tokens", architecture.token_dim)
        sentences = _shape(frames, "sentence_embeddings", sizes["text_dim"])
        faces = (
            _shape(frames, "face_embeddings", sizes["face_dim"])
            if sizes["max_faces"]
            else [np.zeros((0, sizes["face_dim"]), np.float32)] * len(frames)
        )
        pictures = PictureFolder(scratch, self.config.jpeg_quality)
        self._paint(renderer, pictures, tokens, sentences, faces, progress)
        size = {"width_px": architecture.width_px, "height_px": architecture.height_px}
        with pq.ParquetWriter(out / "pictures.parquet", PICTURES_SCHEMA) as writer:
            for start in range(0, len(frames), ROW_GROUP):
                rows = [
                    {name: frame[name] for name in ("frame_index", "shot_index", "script")}
                    | {"jpeg": pictures.read(start + place)}
                    | size
                    for place, frame in enumerate(frames[start : start + ROW_GROUP])
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=PICTURES_SCHEMA))
        return {"pictures": len(frames), **size}

    def _paint(
        self,
        renderer: "Renderer",
        pictures: "PictureFolder",
        tokens: list[np.ndarray],
        sentences: list[np.ndarray],
        faces: list[np.ndarray],
        progress: Progress,
    ) -> None:
        """Make the pictures that a killed run has not left behind."""
        import torch

        from models.samplers import SamplerError

        conditions = (
            torch.from_numpy(np.stack(tokens)), renderer.pad_sentences(sentences), renderer.pad_faces(faces)
        )  # fmt: skip
        batches = renderer.decode(
            *(condition.to(renderer.autoencoder.device) for condition in conditions),
            self.config.sampling_steps,
            self.config.seed,
            self.config.batch_pictures,
            scheduler=self.config.scheduler,
            precision=self.config.precision,
            done=lambda places: all(place in pictures for place in places),
        )
        try:
            for places, made in batches:
                for place, picture in zip(places, made, strict=True):
                    pictures.keep(place, picture)
                progress(places.stop, len(tokens), "pictures")
        except SamplerError as error:
            raise UsageError(f"render.scheduler: {error}") from error


def _read_frames(paths: list[Path]) -> list[dict[str, Any]]:
    frames = [row for path in paths if path.suffix == ".parquet" for row in pq.read_table(path).to_pylist()]
    if not frames:
        raise MissingInputError("the dream holds no frame: run the dream stage on a story with at least one frame")
    return sorted(frames, key=lambda frame: frame["frame_index"])


def _shape(frames: list[dict[str, Any]], column: str, width: int) -> list[np.ndarray]:
    """A column's flat lists as float32 arrays [entry, width]."""
    arrays = [np.asarray(frame[column] or [], np.float32) for frame in frames]
    for frame, array in zip(frames, arrays, strict=True):
        if array.size % width:
            raise MissingInputError(
                f"{column} of frame {frame['frame_index']} holds {array.size} numbers, no multiple of {width}: "
                "dream again with models trained together with this renderer"
            )
    return [array.reshape(-1, width) for array in arrays]
