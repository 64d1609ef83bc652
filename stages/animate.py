"""Keyframes to clips to a movie.

With `clips: svd`, Stable Video Diffusion sets every picture in motion: it is the first frame of `seconds_per_keyframe`
of movie, and where one clip of the model is too short for that, further ones are chained to it under the feature of
the picture. The model's frames are `svd.fps` to a second of movie; those between them are made by optical flow.

With `clips: optical_flow`, the pictures of one shot are filled up to the film's frame rate by optical-flow
interpolation; a shot of `n` pictures lasts `n` times `seconds_per_keyframe`, its first frame is its first picture and
its last frame its last.

Either way every picture appears in the movie exactly once as it is, and clips are joined without encoding again. A
finished clip stays in the scratch folder, so a killed run goes on with the clips that are missing.

Source: section 3.5 of the paper. Optical flow, which needs no weights, and the model's drift meter are ours.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from stages.clip_model import SvdConfig
from stages.errors import ComputationError, MissingInputError
from stages.spec import Inputs, Progress, StageConfig, StageSpec

if TYPE_CHECKING:
    from models.clip_chain import ChainedClip
    from models.video_diffusion import VideoDiffusion


class AnimateConfig(StageConfig):
    """Settings of the movie."""

    clips: Literal["optical_flow", "svd"] = Field("optical_flow", description="What sets pictures in motion.")
    svd: SvdConfig = Field(SvdConfig(), description="Of `clips: svd`.")
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

    def is_heavy(self) -> bool:
        """Whether the video model runs."""
        return self.clips == "svd"

    def weights(self) -> tuple[str, ...]:
        """The video model's."""
        return (self.svd.weights,) if self.clips == "svd" else ()

    def recipe(self) -> dict[str, Any]:
        """Settings of the video model count where it runs."""
        values = {name: value for name, value in super().recipe().items() if name != "svd"}
        return values | {"svd": self.svd.recipe()} if self.clips == "svd" else values


SPEC = StageSpec(
    name="animate",
    version=2,
    implementation="stages.animate:Animate",
    inputs=("pictures",),
    output="movie",
    scope="set",
    cpus=2.0,
    description="pictures to clips to movie.mp4",
)


@dataclass(frozen=True)
class Clip:
    """A run of pictures of one shot, one with `clips: svd`, and the movie frames it gets."""

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
    last picture) and `start_s` and `end_s` in the movie. With `clips: svd` a clip is one picture's, and `generated`
    lists what the model made for it: `start_s` in the movie, `begins` (`keyframe`, `last_frame` of the one before, or
    `anchor`: at the keyframe again), `seed`, and `similarity`, the cosine between its last frame and the keyframe.
    """

    def __init__(self, config: AnimateConfig, weights_dir: Path | None = None):
        self.config = config
        self.weights_dir = weights_dir
        self.fps = Fraction(str(config.fps)).limit_denominator(1001)

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Make the movie of the one pictures file in `inputs`.

        Raises:
            MissingInputError: There is no pictures file.
            ComputationError: There are no pictures, they are out of order, differ in size or cannot be decoded, or
                the movie cannot be written.
            WeightsError: The video model is not there, or cannot be read.
        """
        import av

        if not inputs.get("pictures"):
            raise MissingInputError("stage animate needs the artifact 'pictures' and got none: run stage render first")
        path = inputs["pictures"][0]
        whole_shots = self.config.clips == "optical_flow"
        clips = plan_clips(read_order(path), self.fps, self.config.seconds_per_keyframe, whole_shots)
        try:
            films = self._write_clips(path, clips, scratch, progress)
            size = _join(films, out / "movie.mp4")
            listed = [_describe(clip, self.fps, film) for clip, film in zip(clips, films, strict=True)]
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
            **_summarize_drift([made for clip in listed for made in clip.get("generated", [])]),
        }

    def _write_clips(self, pictures: Path, clips: list[Clip], scratch: Path, progress: Progress) -> list[Path]:
        """One film a clip, in `scratch`; those that are there already are kept."""
        from models.video_writer import write_film

        total, size = clips[-1].start + clips[-1].frames, None
        jpegs, films = _read_jpegs(pictures), []
        for number, clip in enumerate(clips):
            sources = list(itertools.islice(jpegs, len(clip.frame_indexes)))
            size = size or self._movie_size(_decode(sources[0], clip.frame_indexes[0]))
            films.append(scratch / f"clip-{number:06d}.mp4")

            def report(done: int, detail: str = "", clip: Clip = clip, number: int = number) -> None:
                progress(clip.start + done, total, f"clip {number + 1} of {len(clips)}{detail}")

            if not films[-1].exists():
                if self.config.clips == "svd":
                    picture = _decode(sources[0], clip.frame_indexes[0])
                    frames = self._generate(number, clip, picture, size, films[-1].with_suffix(".json"), report)
                else:
                    frames = _count(self._interpolate(clip, sources, size), report)
                write_film(frames, films[-1], width_px=size[0], height_px=size[1], fps=self.fps, crf=self.config.crf)
            report(clip.frames)
        return films

    def _movie_size(self, picture: np.ndarray) -> tuple[int, int]:
        """Width and height of the movie: the picture's proportions, both even."""
        height, width = picture.shape[:2]
        wanted = self.config.height_px or height
        return max(2, 2 * round(width * wanted / height / 2)), max(2, 2 * round(wanted / 2))

    def _interpolate(self, clip: Clip, jpegs: list[bytes], size: tuple[int, int]) -> Iterator[np.ndarray]:
        """The clip's frames by optical flow; two of its pictures are held at a time."""
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

    def _generate(
        self,
        number: int,
        clip: Clip,
        picture: np.ndarray,
        size: tuple[int, int],
        record: Path,
        report: Callable[[int, str], None],
    ) -> Iterator[np.ndarray]:
        """The frames of a picture's clip by the video model; when all are drawn, `record` holds what was made."""
        from models.clip_chain import ChainedClip, chain_clips, sample_frames

        svd, made = self.config.svd, list[ChainedClip]()
        most = svd.clips_in(self.config.seconds_per_keyframe)

        def tell(generated: int, step: int) -> None:
            done = clip.frames * (generated * svd.steps + step) // (most * svd.steps)
            report(done, f", generation {generated + 1} of {most}, step {step} of {svd.steps}")

        chain = chain_clips(
            self._model,
            picture,
            svd.clip_settings(),
            seed=svd.seed + number * most,
            reanchor_below=svd.reanchor_below,
            made=made,
            report=tell,
        )
        times = [float(frame * svd.fps / self.fps) for frame in range(clip.frames)]
        yield from sample_frames((f._replace(picture=_fit(f.picture, size)) for f in chain), times)
        _write_text(record, json.dumps([_place(one, clip.start / self.fps, svd.fps) for one in made]) + "\n")

    @cached_property
    def _model(self) -> "VideoDiffusion":
        return self.config.svd.open(self.weights_dir)


def plan_clips(
    order: list[tuple[int, int]], fps: Fraction, seconds_per_keyframe: float, whole_shots: bool = True
) -> list[Clip]:
    """Cut pictures into clips, and give each picture its time without drift.

    Args:
        order: `frame_index` and `shot_index` of each picture, in story order.
        fps: Frames a second of the movie.
        seconds_per_keyframe: Time of one picture.
        whole_shots: A clip is a shot's pictures; else each picture has its own.
    """
    clips, position = [], 0
    for (shot_index, _), run in itertools.groupby(order, key=lambda p: (p[1], None if whole_shots else p[0])):
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
    from models.pictures import decode_picture

    picture = decode_picture(jpeg)
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


def _join(films: list[Path], movie: Path) -> tuple[int, int]:
    """Join the clips under a temporary name, rename, and return the movie's width and height."""
    import av

    from models.video_writer import join_films

    temporary = movie.with_name(f".{movie.name}.part")
    join_films(films, temporary)
    temporary.replace(movie)
    with av.open(str(movie)) as container:
        return container.streams.video[0].width, container.streams.video[0].height


def _count(frames: Iterator[np.ndarray], report: Callable[[int], None]) -> Iterator[np.ndarray]:
    for number, frame in enumerate(frames):
        report(number)
        yield frame


def _describe(clip: Clip, fps: Fraction, film: Path) -> dict[str, Any]:
    record = film.with_suffix(".json")
    return {
        "shot_index": clip.shot_index,
        "first_frame": clip.frame_indexes[0],
        "last_frame": clip.frame_indexes[-1],
        "start_s": round(float(clip.start / fps), 6),
        "end_s": round(float((clip.start + clip.frames) / fps), 6),
        **({"generated": json.loads(record.read_text())} if record.exists() else {}),
    }


def _place(made: "ChainedClip", start_s: Fraction, fps: int) -> dict[str, Any]:
    values = asdict(made)
    return {"start_s": round(float(start_s + Fraction(values.pop("position"), fps)), 6), **values}


def _summarize_drift(generated: list[dict[str, Any]]) -> dict[str, int | float]:
    """What the video model made, and how far it went from its keyframes; nothing where it made nothing."""
    if not generated:
        return {}
    return {
        "generated_clips": len(generated),
        "reanchored_clips": sum(made["begins"] == "anchor" for made in generated),
        "lowest_similarity": round(min(made["similarity"] for made in generated), 4),
    }


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)
