"""The report: one HTML file that opens without a server and says what every number in it means.

`build_report` knows nothing of storage or Prefect: the caller fills a `ReportData`. Every picture, the styles and the
movie stand inside the file; counts and sizes are limited so that it stays below about 15 MB, and where something was
left out the page says how much.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"
FILMS_SHOWN = 8
KEYFRAMES_SHOWN = 16  # of a film
CHARACTERS_SHOWN = 24
FACES_SHOWN = 6  # of a character
SCRIPTS_SHOWN = 8
RECONSTRUCTIONS_SHOWN = 12
GENERATED_SHOWN = 40
ARTIFACTS_SHOWN = 300
PICTURE_WIDTH_PX = 360
FACE_WIDTH_PX = 112
JPEG_QUALITY = 78
MOVIE_LIMIT_BYTES = 7_000_000  # base64 makes it 9.3 MB


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the stored keyframe; `x1`, `y1` exclusive."""

    x0: float
    y0: float
    x1: float
    y1: float
    label: str = ""


@dataclass(frozen=True)
class Keyframe:
    """A keyframe with the people and faces that were found in it."""

    jpeg: bytes
    frame_index: int
    time_s: float
    shot_index: int
    people: Sequence[Box] = ()
    faces: Sequence[Box] = ()


@dataclass(frozen=True)
class Film:
    """An ingested film.

    Attributes:
        film_id: Its id.
        uri: Where it came from.
        duration_s: Length; None if unknown.
        keyframes: The contact sheet, all or some.
        keyframe_count: Keyframes in all.
        rejects: Stage to reason to count of items left out.
        error: Why the film failed, if it did.
        sentences: Of its scripts, all together.
        untraced: Of them, those that no caption bears out.
    """

    film_id: str
    uri: str
    duration_s: float | None = None
    keyframes: Sequence[Keyframe] = ()
    keyframe_count: int = 0
    rejects: dict[str, dict[str, int]] = field(default_factory=dict)
    error: str | None = None
    sentences: int = 0
    untraced: int = 0


@dataclass(frozen=True)
class Character:
    """A character of a film: on how many keyframes it is seen, and some of its faces."""

    film_id: str
    name: str
    keyframe_count: int
    faces: Sequence[bytes] = ()


@dataclass(frozen=True)
class ScriptedKeyframe:
    """A keyframe of a film beside its script (a `FrameScript` as a dict)."""

    film_id: str
    frame_index: int
    jpeg: bytes
    script: dict[str, Any]


@dataclass(frozen=True)
class Reconstruction:
    """A keyframe beside what the autoencoder made of its tokens."""

    original: bytes
    reconstruction: bytes
    label: str = ""


@dataclass(frozen=True)
class GeneratedKeyframe:
    """A generated keyframe beside the script it was made from."""

    frame_index: int
    shot_index: int
    jpeg: bytes
    script: dict[str, Any]


@dataclass(frozen=True)
class ArtifactRow:
    """A stored artifact."""

    stage: str
    version: int
    subject: str
    digest: str
    rows: int | None
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class ReportData:
    """All that a report shows. Every part may be empty; an empty part is said to be empty.

    Attributes:
        title: Heading of the page.
        films: Ingested films with their contact sheets.
        characters: Characters of all films.
        scripts: Keyframes beside their scripts.
        reconstructions: Originals beside reconstructions.
        histories: Training stage to its `history.json`: dicts with `phase`, `step`, `loss`.
        generated: Generated keyframes beside their scripts.
        movie: The MP4 file; None if none was made.
        movie_name: Where the movie lies, shown beside it.
        evaluation: The list in `evaluation.json`.
        tables: The paper's tables 1 and 2 with what was scored here, from `flows.report_tables`.
        artifacts: Every artifact that the report rests on.
        facts: Name to value: profile, versions, times.
    """

    title: str = "moviedreamer"
    films: Sequence[Film] = ()
    characters: Sequence[Character] = ()
    scripts: Sequence[ScriptedKeyframe] = ()
    reconstructions: Sequence[Reconstruction] = ()
    histories: dict[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    generated: Sequence[GeneratedKeyframe] = ()
    movie: bytes | None = None
    movie_name: str = ""
    evaluation: Sequence[dict[str, Any]] = ()
    tables: Sequence[dict[str, Any]] = ()
    artifacts: Sequence[ArtifactRow] = ()
    facts: dict[str, str] = field(default_factory=dict)


def build_report(data: ReportData, out: Path) -> Path:
    """Write the report to `out`, at once and whole, and return its path.

    Raises:
        OSError: The file cannot be written.
    """
    page = render_page(data)
    temporary = out.with_name(f".{out.name}.part")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def render_page(data: ReportData) -> str:
    """The report as one HTML text; everything in `data` is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        picture=encode_picture, clock=format_clock, size=format_size, number=format_number, count=format_count
    )
    shown = {
        "films": data.films[:FILMS_SHOWN],
        "characters": data.characters[:CHARACTERS_SHOWN],
        "scripts": spread(data.scripts, SCRIPTS_SHOWN),
        "reconstructions": spread(data.reconstructions, RECONSTRUCTIONS_SHOWN),
        "generated": spread(data.generated, GENERATED_SHOWN),
        "artifacts": data.artifacts[:ARTIFACTS_SHOWN],
    }
    return environment.get_template("report.html").render(
        data=data,
        shown=shown,
        sheets=[spread(film.keyframes, KEYFRAMES_SHOWN) for film in shown["films"]],
        curves={stage: plot_history(history) for stage, history in data.histories.items()},
        movie_uri=encode_movie(data.movie),
        faces_shown=FACES_SHOWN,
        face_width_px=FACE_WIDTH_PX,
    )


def spread(items: Sequence, limit: int) -> list:
    """At most `limit` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


@dataclass(frozen=True)
class Picture:
    """A picture ready for the page: its data URI, the size it is shown at, and the size its boxes refer to."""

    uri: str
    width_px: int
    height_px: int
    source_width_px: int
    source_height_px: int


def encode_picture(jpeg: bytes, width_px: int = PICTURE_WIDTH_PX) -> Picture | None:
    """Shrink a picture to at most `width_px` and encode it as a data URI; None if it cannot be decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            source = image.size
            image.draft("RGB", (2 * width_px, 2 * width_px))
            picture = image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        return None
    scale = min(1, width_px / source[0], 2 * width_px / source[1])
    size = (max(1, round(source[0] * scale)), max(1, round(source[1] * scale)))
    data = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(data, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return Picture(f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}", *size, *source)


def encode_movie(movie: bytes | None) -> str | None:
    """The movie as a data URI; None if there is none or it is too large for the page."""
    if movie is None or len(movie) > MOVIE_LIMIT_BYTES:
        return None
    return f"data:video/mp4;base64,{base64.b64encode(movie).decode()}"


@dataclass(frozen=True)
class Panel:
    """The loss curve of one training phase, in the coordinates of a 360 x 200 drawing.

    Attributes:
        phase: Name of the phase.
        raw: SVG points of the loss at each step that was recorded.
        smooth: SVG points of its moving mean.
        x_ticks: Position and label of the step axis.
        y_ticks: Position and label of the loss axis.
        first: Smoothed loss at the start.
        last: Smoothed loss at the end.
        steps: Last step.
        left_out: Values that were no finite number.
    """

    phase: str
    raw: str
    smooth: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    first: float
    last: float
    steps: int
    left_out: int


PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 48.0, 350.0, 10.0, 164.0
PLOT_POINTS = 400


def plot_history(history: Sequence[dict[str, Any]]) -> list[Panel]:
    """One panel for each phase of a training history, in order; phases without a finite loss are left out."""
    phases: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        phases.setdefault(str(entry.get("phase", "training")), []).append((entry["step"], entry["loss"]))
    panels = []
    for phase, points in phases.items():
        finite = [(step, loss) for step, loss in points if loss is not None and math.isfinite(loss)]
        if finite:
            panels.append(_plot_phase(phase, finite, len(points) - len(finite)))
    return panels


def _plot_phase(phase: str, points: list[tuple[int, float]], left_out: int) -> Panel:
    steps, losses = zip(*points, strict=True)
    means = smooth(losses)
    ordered = sorted(losses)
    low, high = ordered[0], max(ordered[int(0.98 * (len(ordered) - 1))], max(means[len(means) // 20 :]))
    x_ticks, y_ticks = choose_ticks(steps[0], steps[-1]), choose_ticks(low, high)
    place_x = _scale(min(steps[0], x_ticks[0]), max(steps[-1], x_ticks[-1]), PLOT_LEFT, PLOT_RIGHT)
    place_y = _scale(min(low, y_ticks[0]), max(high, y_ticks[-1]), PLOT_BOTTOM, PLOT_TOP)

    def trace(values: Sequence[float]) -> str:
        pairs = spread(list(zip(steps, values, strict=True)), PLOT_POINTS)
        return " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in pairs)

    return Panel(
        phase=phase,
        raw=trace(losses),
        smooth=trace(means),
        x_ticks=[(place_x(tick), format_number(tick)) for tick in x_ticks],
        y_ticks=[(place_y(tick), format_number(tick)) for tick in y_ticks],
        first=means[0],
        last=means[-1],
        steps=steps[-1],
        left_out=left_out,
    )


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over a twentieth of the values (at least 3, at most 101)."""
    half = min(50, max(1, len(values) // 40))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def choose_ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers (1, 2 or 5 times a power of ten apart) that span `low` to `high`."""
    if high <= low:
        return [low]
    magnitude = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(magnitude * m for m in (1, 2, 5, 10) if magnitude * m >= (high - low) / 5)
    return [step * i for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Map `low..high` to `start..end`; values outside land on the edge."""
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * min(1.0, max(0.0, (value - low) / span))


def format_number(value: float | None) -> str:
    """At most four significant digits, thousands grouped; `-` for none."""
    if value is None:
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    rounded = float(f"{value:.4g}")
    return f"{rounded:,.0f}" if rounded == int(rounded) else f"{rounded:,.4f}".rstrip("0")


def format_count(value: int | None) -> str:
    """A whole number with its thousands grouped; `-` for none."""
    return "-" if value is None else f"{value:,}"


def format_clock(seconds: float | None) -> str:
    """Seconds as `1.25 s`, `2:05` or `1:02:05`; `-` for none."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_size(size: int | None) -> str:
    """Bytes in the largest fitting decimal unit; `-` for none."""
    if size is None:
        return "-"
    if size < 1000:
        return f"{size} B"
    power = min(4, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
