"""Measurements of a keyframe and the people in it: the facts that a captioner of rules puts into words.

Dimensions: height, width: pixels of the keyframe; row, column: the small grid on which scenes are measured;
pixel: a list of pixels; line: rows or columns; 3: red, green, blue, or CIELAB.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from models.colors import MUTED_CHROMA, chroma_of, lab_of

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the keyframe, x1 and y1 exclusive."""

_GRID_PX = 96
_DETAIL_PX = 320
_DETAIL_STEP = 0.04
# Eye distance in distances from eyes to mouth, below which a face is a profile.
_MIN_EYE_DISTANCE = 0.35
_BAR_LUMA = 20
_MAX_BAR_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Face:
    """A face in the keyframe; `landmarks`: (5, 2) pixels: the eye on the picture's left, on its right, nose, mouth
    corner on the left, on the right."""

    box: Box
    landmarks: Float[np.ndarray, "5 2"]


@dataclass(frozen=True, slots=True)
class Person:
    """A person in the keyframe.

    Attributes:
        name: "Person 1" and so on; None for a person who is not identified.
        box: Where the person is.
        mask: 0..255, the size of the box rounded out to whole pixels.
        face: The person's face, None where none was found.
    """

    name: str | None
    box: Box
    mask: UInt8[np.ndarray, "height width"]
    face: Face | None


@dataclass(frozen=True, slots=True)
class Scene:
    """What was measured of a keyframe before words are put to it.

    Attributes:
        lab: CIELAB of the picture without black bars, on a small grid.
        background: Where no person is, on the same grid.
        height_px: Height of the picture without black bars.
        width_px: Width of the whole picture.
        colorless: The picture is black and white, or tinted in one colour: no colour can be named.
        detail: Share of the picture, 0..1, where neighbouring pixels differ clearly, at 320 pixels.
    """

    lab: Float[np.ndarray, "row column 3"]
    background: Bool[np.ndarray, "row column"]
    height_px: int
    width_px: int
    colorless: bool
    detail: float


def measure_scene(image: UInt8[np.ndarray, "height width 3"], people: list[Person]) -> Scene:
    """Measure what sentences about a keyframe need.

    Raises:
        ValueError: A mask does not have the size of its box rounded out.
    """
    top, bottom, left, right = find_picture_area(image)
    covered = np.zeros(image.shape[:2], np.uint8)
    for person in people:
        _paste(covered, person)
    picture = image[top:bottom, left:right]
    small = _shrink(picture, _GRID_PX)
    rows, columns = small.shape[:2]
    covered = cv2.resize(covered[top:bottom, left:right], (columns, rows), interpolation=cv2.INTER_AREA)
    lab = lab_of(small.reshape(-1, 3)).reshape(rows, columns, 3)
    return Scene(
        lab=lab,
        background=covered < 64,
        height_px=bottom - top,
        width_px=image.shape[1],
        colorless=is_colorless(lab.reshape(-1, 3)),
        detail=measure_detail(picture),
    )


def find_picture_area(image: UInt8[np.ndarray, "height width 3"]) -> tuple[int, int, int, int]:
    """The picture inside black bars: top, bottom, left, right in pixels, bottom and right exclusive.

    Bars count only in pairs, up to a quarter of the picture on each side.
    """
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    top, bottom = _find_bars(np.percentile(luma, 98, axis=1))
    left, right = _find_bars(np.percentile(luma, 98, axis=0))
    height, width = luma.shape
    return top, height - bottom, left, width - right


def _find_bars(brightness: Float[np.ndarray, " line"]) -> tuple[int, int]:
    lit = np.flatnonzero(brightness > _BAR_LUMA)
    if len(lit) == 0:
        return 0, 0
    before, after = int(lit[0]), len(brightness) - 1 - int(lit[-1])
    limit = _MAX_BAR_SHARE * len(brightness)
    paired = min(before, after) >= 0.5 * max(before, after) and max(before, after) <= limit
    return (before, after) if paired else (0, 0)


def is_colorless(lab: Float[np.ndarray, "pixel 3"]) -> bool:
    """Whether a picture is black and white or tinted in one weak colour.

    Colour that is the same everywhere (a tint) or depends on lightness only (a toned print) is no colour of things.
    """
    weak = float(np.percentile(chroma_of(lab), 99)) < MUTED_CHROMA * 1.5
    lightness = lab[:, 0] / 100
    powers = np.stack([np.ones_like(lightness), lightness, lightness**2], axis=1)
    explained = powers @ np.linalg.lstsq(powers, lab[:, 1:], rcond=None)[0]
    return weak and float(np.percentile(np.hypot(*(lab[:, 1:] - explained).T), 98)) < 3.0


def measure_detail(image: UInt8[np.ndarray, "height width 3"]) -> float:
    """The share of the picture, 0..1, where luma steps by more than 4% between neighbouring pixels, at 320 pixels."""
    luma = cv2.cvtColor(_shrink(image, _DETAIL_PX), cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    if min(luma.shape) < 2:
        return 0.0
    down, across = np.abs(np.diff(luma, axis=0)), np.abs(np.diff(luma, axis=1))
    return float(max((down > _DETAIL_STEP).mean(), (across > _DETAIL_STEP).mean()))


def measure_facing(face: Face) -> tuple[float, float | None]:
    """Yaw and roll of a face from its 5 landmarks.

    Returns:
        yaw: How far the nose lies off the middle of the eyes, across the face, in eye distances; positive: to the
            picture's right. 0 faces the camera, beyond about 0.6 is a profile.
        roll: Degrees by which the line of the eyes is turned; positive: the top of the head leans to the right.
            None where the eyes meet, as in a profile.
    """
    left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
    across = right_eye - left_eye
    down = (left_mouth + right_mouth - left_eye - right_eye) / 2
    eye_distance, length = float(np.hypot(*across)), max(float(np.hypot(*down)), 1e-6)
    offset = nose - (left_eye + right_eye) / 2
    if eye_distance < _MIN_EYE_DISTANCE * length:
        # The line of two eyes that meet has no direction: take the perpendicular of the line from eyes to mouth.
        axis = np.array([down[1], -down[0]]) / length
        return float(offset @ axis) / (_MIN_EYE_DISTANCE * length), None
    return float(offset @ across) / eye_distance**2, float(np.degrees(np.arctan2(across[1], across[0])))


def _shrink(image: UInt8[np.ndarray, "height width 3"], long_side: int) -> UInt8[np.ndarray, "row column 3"]:
    height, width = image.shape[:2]
    scale = min(1.0, long_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _paste(covered: UInt8[np.ndarray, "height width"], person: Person) -> None:
    """Add a person's mask to that of the whole keyframe."""
    x, y = int(np.floor(person.box[0])), int(np.floor(person.box[1]))
    width, height = int(np.ceil(person.box[2])) - x, int(np.ceil(person.box[3])) - y
    if person.mask.shape != (height, width):
        raise ValueError(
            f"the mask is {person.mask.shape[1]}x{person.mask.shape[0]} pixels, its box {person.box} is "
            f"{width}x{height}: redo the people of this film"
        )
    x0, y0 = max(x, 0), max(y, 0)
    target = covered[y0 : y + height, x0 : x + width]
    source = person.mask[y0 - y : y0 - y + target.shape[0], x0 - x : x0 - x + target.shape[1]]
    np.maximum(target, source, out=target)


def find_body_areas(person: Person) -> tuple[Box | None, Box | None]:
    """Where the clothing of the upper and of the lower body is, in pixels; None where it is out of the picture.

    Proportions count from the face (a body is about 10 face heights from chin to foot), else from an upright box.
    """
    x0, y0, x1, y1 = person.box
    if person.face is None:
        height, width = y1 - y0, x1 - x0
        if height < 2.0 * width:
            return None, None
        return (x0, y0 + 0.22 * height, x1, y0 + 0.45 * height), (x0, y0 + 0.58 * height, x1, y0 + 0.85 * height)
    left, top, right, chin = person.face.box
    middle, unit = (left + right) / 2, chin - top
    sides = (max(x0, middle - 1.6 * unit), min(x1, middle + 1.6 * unit))
    upper = (sides[0], chin + 0.1 * unit, sides[1], min(y1, chin + 3.0 * unit))
    lower = (sides[0], chin + 4.2 * unit, sides[1], min(y1, chin + 7.0 * unit))
    return tuple(area if area[3] - area[1] > 0.08 * unit and area[2] > area[0] else None for area in (upper, lower))


def find_skin(image: UInt8[np.ndarray, "height width 3"], person: Person) -> Float[np.ndarray, "pixel 3"]:
    """CIELAB of the middle of the face; empty without a face."""
    if person.face is None:
        return np.zeros((0, 3), np.float32)
    x0, y0, x1, y1 = person.face.box
    width, height = x1 - x0, y1 - y0
    inset = (x0 + 0.25 * width, y0 + 0.35 * height, x1 - 0.25 * width, y1 - 0.2 * height)
    return find_person_pixels(image, person, inset)


def find_long_hair(image: UInt8[np.ndarray, "height width 3"], person: Person) -> Float[np.ndarray, "pixel 3"]:
    """CIELAB of what belongs to the person beside the jaw, on the side where more is seen, or on both where as much is;
    empty without a face or when little is there."""
    if person.face is None:
        return np.zeros((0, 3), np.float32)
    x0, y0, x1, y1 = person.face.box
    width, top, bottom = x1 - x0, y0 + 0.5 * (y1 - y0), y1 - 0.15 * (y1 - y0)
    sides = [
        find_person_pixels(image, person, (x, top, x + 0.35 * width, bottom))
        for x in (x0 - 0.4 * width, x1 + 0.05 * width)
    ]
    most = max(map(len, sides))
    sample = np.concatenate([side for side in sides if len(side) == most])
    return sample if most > 0.3 * 0.35 * width * (bottom - top) else sample[:0]


def find_person_pixels(
    image: UInt8[np.ndarray, "height width 3"], person: Person, area: Box
) -> Float[np.ndarray, "pixel 3"]:
    """CIELAB of the pixels of an area that surely belong to the person."""
    height, width = image.shape[:2]
    x0, y0 = max(0, int(np.floor(area[0]))), max(0, int(np.floor(area[1])))
    x1, y1 = min(width, int(np.ceil(area[2]))), min(height, int(np.ceil(area[3])))
    left, top = int(np.floor(person.box[0])), int(np.floor(person.box[1]))
    x0, y0 = max(x0, left), max(y0, top)
    x1, y1 = min(x1, left + person.mask.shape[1]), min(y1, top + person.mask.shape[0])
    if x1 <= x0 or y1 <= y0:
        return np.zeros((0, 3), np.float32)
    sure = person.mask[y0 - top : y1 - top, x0 - left : x1 - left] > 160
    return lab_of(image[y0:y1, x0:x1][sure])
