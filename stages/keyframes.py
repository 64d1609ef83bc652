"""Keyframes: every n-th frame of a film by presentation order, as JPEG, with the shot that it belongs to.

The paper takes keyframes from long films and describes each (section 3.1, appendix A). Frames are exact: bit-identical
to decoding every frame and keeping each n-th. Each keyframe also carries what later stages want to know of its
moment: shot, likeness to the keyframe before, motion and light.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import Field

from models import weights
from stages.errors import FilmError
from stages.spec import Fail, Ok, Outcome, Row, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from models.frames import Picture
    from models.shot_boundaries import ShotTracker
    from models.video import Film


class KeyframesConfig(StageConfig):
    """Settings of the keyframes stage."""

    every_n_frames: int = Field(30, ge=1, description="Keep every n-th frame by presentation order, from the first")
    max_side_px: int | None = Field(
        1024, ge=16, description="Longer side of a kept picture at the most, in pixels; null keeps the film's size"
    )
    jpeg_quality: int = Field(92, ge=1, le=100, description="JPEG quality of kept pictures")
    min_shot_similarity: float = Field(
        0.7, ge=-1, le=1, description="Cosine of EfficientNet-lite0 features from which adjacent keyframes are one shot"
    )
    max_duration_s: float = Field(6 * 3600.0, gt=0, description="Refuse films that are or claim to be longer, in s")
    max_pixels: int = Field(8192 * 4320, ge=1, description="Refuse films whose width times height is more")
    decode_threads: int = neutral(1, "Threads that decode one film", ge=1)

    def weights(self) -> tuple[str, ...]:
        """The network that tells shots apart."""
        return ("efficientnet_lite0",)


SPEC = StageSpec(
    name="keyframes",
    version=1,
    implementation="stages.keyframes:Keyframes",
    inputs=("film",),
    output="keyframes",
    schema=pa.schema(
        [
            pa.field("film_id", pa.string(), nullable=False),
            pa.field("frame_index", pa.int64(), nullable=False),
            pa.field("time_s", pa.float64(), nullable=False),
            pa.field("width_px", pa.int32(), nullable=False),
            pa.field("height_px", pa.int32(), nullable=False),
            pa.field("source_width_px", pa.int32(), nullable=False),
            pa.field("source_height_px", pa.int32(), nullable=False),
            pa.field("shot_index", pa.int32(), nullable=False),
            pa.field("shot_similarity", pa.float32()),
            pa.field("motion", pa.float32()),
            pa.field("luma", pa.float32(), nullable=False),
            pa.field("jpeg", pa.binary(), nullable=False),
        ]
    ),
    key=("film_id",),
    scope="film",
    description="Exact every n-th frame as JPEG, with shots, motion and light",
)


class Keyframes:
    """Reads films; holds the network that tells shots apart."""

    def __init__(self, config: KeyframesConfig, weights_dir: Path | None = None) -> None:
        from models.shot_boundaries import load_efficientnet
        from models.video import Limits

        self.config = config
        self._limits = Limits(config.max_duration_s, config.max_pixels)
        self._network = load_efficientnet(weights.file("efficientnet_lite0", weights_dir))

    def __call__(self, *, film: list[Row]) -> Iterator[Outcome]:
        """Yield one outcome a film: its keyframes, produced as they are consumed, or why it cannot be read.

        Args:
            film: Rows with `film_id` and `uri`, the path of a local file.

        Raises:
            FilmError: From the rows of an `Ok`, where a film proves damaged only while it is decoded.
        """
        from models.shot_boundaries import ShotTracker
        from models.video import VideoError, open_film

        for row in film:
            try:
                opened = open_film(row["uri"], self._limits)
            except VideoError as error:
                yield Fail(SPEC.item_of(row), str(error))
                continue
            tracker = ShotTracker(self._network, self.config.min_shot_similarity)
            yield Ok(SPEC.item_of(row), self._read_rows(row["film_id"], opened, tracker))

    def _read_rows(self, film_id: str, film: "Film", tracker: "ShotTracker") -> Iterator[Row]:
        from models.frames import read_frames
        from models.video import VideoError

        config = self.config
        try:
            for picture in read_frames(film, config.every_n_frames, config.max_side_px, config.decode_threads):
                yield {"film_id": film_id, **describe_keyframe(picture, tracker, config.jpeg_quality)}
        except VideoError as error:
            raise FilmError(str(error)) from error


def describe_keyframe(picture: "Picture", tracker: "ShotTracker", jpeg_quality: int) -> Row:
    """The row of one keyframe, without its film."""
    seen = tracker.add(picture.rgb)
    height_px, width_px = picture.rgb.shape[:2]
    return {
        "frame_index": picture.frame_index,
        "time_s": picture.time_s,
        "width_px": width_px,
        "height_px": height_px,
        "source_width_px": picture.source_width_px,
        "source_height_px": picture.source_height_px,
        "shot_index": seen.shot_index,
        "shot_similarity": seen.similarity,
        "motion": seen.motion,
        "luma": seen.luma,
        "jpeg": _encode_jpeg(picture, jpeg_quality),
    }


def _encode_jpeg(picture: "Picture", quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.rgb).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
