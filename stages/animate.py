"""Keyframes to clips to a movie: motion inside a shot, a cut between shots.

The pictures of one shot are filled up to the film's frame rate by optical-flow interpolation, written as one clip,
and the clips are joined without encoding again. Every picture appears in the movie exactly once as it is; a shot of
`n` pictures lasts `n` times `seconds_per_keyframe`, its first frame is its first picture and its last frame its last.
A finished clip stays in the scratch folder, so a killed run goes on with the clips that are missing.

Source: section 3.5 of the paper, which uses an image-to-video diffusion model where this uses optical flow.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from stages.errors import ComputationError, MissingInputError
from stages.spec import Inputs, Progress, StageConfig, StageSpec


class AnimateConfig(StageConfig):
    """Settings of the movie."""

    seconds_per_keyframe: float = Field(
        1.25, gt=0, le=60, description="Time each picture gets; every 30th frame at 24 frames a second in the paper."
    )
    fps: float = Field(24.0, gt=0, le=240, description="Frames a second of the movie.")
    crf: int = Field(18, ge=0, le=51, description="Quality of x264: 0 is lossless, 51 the worst.")
    height_px: int | None = Field(
        None, ge=2, le=4320, description="Height of the movie, made even; null keeps the pictures' own."
    )

    @model_validator(mode="after")
    def _require_a_frame_each(self) -> "AnimateConfig":
        if self.seconds_per_keyframe * self.fps < 1:
            raise ValueError(
                f"seconds_per_keyframe {self.seconds_per_keyframe} at fps {self.fps} gives a picture less than "
                f"one frame: use at least {1 / self.fps:.4f} seconds"
            )
        return self


SPEC = StageSpec(
    name="animate",
    version=1,
    implementation="stages.animate:Animate",
    inputs=("pictures",),
    output="movie",
    scope="set",
    cpus=2.0,
    description="pictures to clips to movie.mp4 by optical flow",
)


@dataclass(frozen=True)
class Clip:
    """A run of pictures of one shot and the movie frames it gets."""

    shot_index: int
    frame_indexes: tuple[int, ...]
    start: int
    frames: int

    def positions(self) -> list[int]:
        """The clip's frame at which each picture appears as it is, strictly increasing."""
        last = max(1, len(self.frame_indexes) - 1)
        return [round(i * (self.frames - 1) / last) for i in range(len(self.frame_indexes))]


class Animate:
    """Writes `movie.mp4` (H.264, yuv420p, index first) and `clips.json`.

    `clips.json` lists for each clip `shot_index`, `first_frame` and `last_frame` (the `frame_index` of its first and
    last picture) and `start_s` and `end_s` in the movie.
    """

    def __init__(self, config: AnimateConfig, weights_dir: Path | None = None):
        self.config = config
        self.fps = Fraction(str(config.fps)).limit_denominator(1001)

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Make the movie of the one pictures file in `inputs`.

        Raises:
            MissingInputError: There is no pictures file.
            ComputationError: There are no pictures, they are out of order, differ in size or cannot be decoded, or
                the movie cannot be written.
        """
        import av

        if not inputs.get("pictures"):
            raise MissingInputError("stage animate needs the artifact 'pictures' and got none: run stage render first")
        path = inputs["pictures"][0]
        clips = plan_clips(read_order(path), self.fps, self.config.seconds_per_keyframe)
        try:
            films = self._write_clips(path, clips, scratch, progress)
            size = _join(films, out / "movie.mp4")
            listed = [_describe(clip, self.fps) for clip in clips]
            _write_text(out / "clips.json", json.dumps(listed, indent=1) + "\n")
        except (OSError, av.FFmpegError) as error:
            raise ComputationError(
                f"cannot write the movie into {out}: {error}; free space there and under {scratch}, then run again"
            ) from error
        frames = sum(clip.frames for clip in clips)
        return {
            "pictures": sum(len(clip.frame_indexes) for clip in clips),
            "clips": len(clips),
            "frames": frames,
            "duration_s": float(frames / self.fps),
            "width_px": size[0],
            "height_px": size[1],
            "bytes": (out / "movie.mp4").stat().st_size,
        }

    def _write_clips(self, pictures: Path, clips: list[Clip], scratch: Path, progress: Progress) -> list[Path]:
        """One film a clip, in `scratch`; those that are there already are kept."""
        total, done, size = sum(clip.frames for clip in clips), 0, None
        jpegs, films = _read_jpegs(pictures), []
        for number, clip in enumerate(clips):
            sources = list(itertools.islice(jpegs, len(clip.frame_indexes)))
            size = size or self._movie_size(_decode(sources[0], clip.frame_indexes[0]))
            films.append(scratch / f"clip-{number:06d}.mp4")
            if not films[-1].exists():
                frames = self._draw(clip, sources, size)
                counted = _count(frames, progress, done, total, f"clip {number + 1} of {len(clips)}")
                _encode(counted, films[-1], size, self.fps, self.config.crf)
            done += clip.frames
            progress(done, total, f"clip {number + 1} of {len(clips)}")
        return films

    def _movie_size(self, picture: np.ndarray) -> tuple[int, int]:
        """Width and height of the movie: the picture's proportions, both even."""
        height, width = picture.shape[:2]
        wanted = self.config.height_px or height
        return max(2, 2 * round(width * wanted / height / 2)), max(2, 2 * round(wanted / 2))

    def _draw(self, clip: Clip, jpegs: list[bytes], size: tuple[int, int]) -> Iterator[np.ndarray]:
        """The clip's frames; two of its pictures are held at a time."""
        from models.frame_interpolation import Interpolator

        pictures = (_fit(_decode(j, index), size) for j, index in zip(jpegs, clip.frame_indexes, strict=True))
        positions = clip.positions()
        last = next(pictures)
        for start, end in itertools.pairwise(positions):
            first, last = last, next(pictures)
            between = Interpolator(first, last)
            for frame in range(start, end):
                yield between.at((frame - start) / (end - start))
        for _ in range(positions[-1], clip.frames):  # once; a single picture stands for the whole clip
            yield last


def plan_clips(order: list[tuple[int, int]], fps: Fraction, seconds_per_keyframe: float) -> list[Clip]:
    """Cut pictures into clips where the shot changes, and give each picture its time without drift.

    Args:
        order: `frame_index` and `shot_index` of each picture, in story order.
        fps: Frames a second of the movie.
        seconds_per_keyframe: Time of one picture.
    """
    clips, position = [], 0
    for shot_index, run in itertools.groupby(order, key=lambda picture: picture[1]):
        indexes = tuple(frame_index for frame_index, _ in run)
        start = round(position * seconds_per_keyframe * fps)
        position += len(indexes)
        end = round(position * seconds_per_keyframe * fps)
        clips.append(Clip(shot_index, indexes, start, end - start))
    return clips


def read_order(path: Path) -> list[tuple[int, int]]:
    """`frame_index` and `shot_index` of each row of a pictures file.

    Raises:
        ComputationError: The file has no rows, or they are not in the order of `frame_index`.
    """
    table = pq.read_table(path, columns=["frame_index", "shot_index"])
    order = list(zip(table["frame_index"].to_pylist(), table["shot_index"].to_pylist(), strict=True))
    if not order:
        raise ComputationError(f"{path.name} holds no pictures: a movie needs a story of at least one frame")
    for (before, _), (after, _) in itertools.pairwise(order):
        if after <= before:
            raise ComputationError(f"{path.name}: frame {after} follows frame {before}; sort the rows by frame_index")
    return order


def _read_jpegs(path: Path) -> Iterator[bytes]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=16, columns=["jpeg"]):
        yield from batch["jpeg"].to_pylist()


def _decode(jpeg: bytes, frame_index: int) -> np.ndarray:
    import cv2

    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) if jpeg else None
    if picture is None:
        raise ComputationError(f"the picture of frame {frame_index} is not a JPEG that can be decoded: render it again")
    return picture


def _fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to the movie's size: Lanczos to enlarge, area means to shrink."""
    import cv2

    if (picture.shape[1], picture.shape[0]) == size:
        return picture
    method = cv2.INTER_LANCZOS4 if size[1] >= picture.shape[0] else cv2.INTER_AREA
    return cv2.resize(picture, size, interpolation=method)


def _encode(frames: Iterator[np.ndarray], film: Path, size: tuple[int, int], fps: Fraction, crf: int) -> None:
    """Write a clip under a temporary name and rename it when it is complete."""
    from models.video_writer import VideoWriter

    temporary = film.with_suffix(".part")
    with VideoWriter(temporary, width_px=size[0], height_px=size[1], fps=fps, crf=crf) as writer:
        for frame in frames:
            writer.write(frame)
    temporary.replace(film)


def _join(films: list[Path], movie: Path) -> tuple[int, int]:
    """Join the clips under a temporary name, rename, and return the movie's width and height."""
    import av

    from models.video_writer import join_films

    temporary = movie.with_name(f".{movie.name}.part")
    join_films(films, temporary)
    temporary.replace(movie)
    with av.open(str(movie)) as container:
        return container.streams.video[0].width, container.streams.video[0].height


def _count(frames: Iterator[np.ndarray], progress: Progress, done: int, total: int, message: str) -> Iterator:
    for number, frame in enumerate(frames):
        progress(done + number, total, message)
        yield frame


def _describe(clip: Clip, fps: Fraction) -> dict[str, int | float]:
    return {
        "shot_index": clip.shot_index,
        "first_frame": clip.frame_indexes[0],
        "last_frame": clip.frame_indexes[-1],
        "start_s": round(float(clip.start / fps), 6),
        "end_s": round(float((clip.start + clip.frames) / fps), 6),
    }


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)
