"""Pictures of a story that another system made: a folder with one a frame, or a video to take them from."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from models.frames import read_frames
from models.pictures import MAX_PIXELS, PictureError, read_picture_file
from models.video import Limits, VideoError, open_film

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LIMITS = Limits(max_duration_s=24 * 3600.0, max_pixels=MAX_PIXELS)


def read_pictures(place: Path, count: int) -> Iterator[bytes]:
    """Yield the encoded pictures of a story's frames, in order.

    Args:
        place: A folder with one picture a frame, taken in the order of their names (`frame-2` before `frame-10`) and
            as they are; or a video, cut into `count` equal parts, of which each gives its middle frame as PNG.
        count: Frames of the story.

    Raises:
        PictureError: There is no such place, it holds more or fewer pictures, or one that cannot be read.
    """
    if place.is_dir():
        yield from _read_folder(place, count)
        return
    if not place.exists():
        raise PictureError(f"no folder and no video at {place}: correct the path")
    try:
        yield from _read_video(place, count)
    except VideoError as error:
        raise PictureError(f"expected a folder of pictures or a video: {error}") from error


def _read_folder(folder: Path, count: int) -> Iterator[bytes]:
    named = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    paths = [path for path in named if path.is_file()]
    if not paths:
        raise PictureError(f"{folder} holds no picture: expected files that end in {', '.join(SUFFIXES)}")
    if len(paths) != count:
        raise PictureError(
            f"{folder} holds {len(paths)} pictures, and the story has {count} frames: expected one picture a frame, in "
            "the order of their names"
        )
    for path in sorted(paths, key=_by_number):
        yield read_picture_file(path)


def _by_number(path: Path) -> list[tuple[int, int, str]]:
    """Sorts numbers in names by their value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.name) if part]


def _read_video(path: Path, count: int) -> Iterator[bytes]:
    film = open_film(path, LIMITS)
    total = sum(entry.shown for entry in film.entries)
    if total < count:
        raise PictureError(f"{path} has {total} frames, and the story has {count}: expected at least one a frame")
    wanted = {(2 * part + 1) * total // (2 * count) for part in range(count)}
    for picture in read_frames(film, 1):
        if picture.frame_index in wanted:
            stream = io.BytesIO()
            Image.fromarray(picture.rgb).save(stream, "PNG")
            wanted.remove(picture.frame_index)
            yield stream.getvalue()
    if wanted:
        raise PictureError(f"{path} lists {total} frames and gave only some of them: repair it with `ffmpeg -i`")
