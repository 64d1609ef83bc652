"""Sentences about a keyframe from what was measured in it: a captioner of rules, no learned model.

Each sentence states one fact that follows from pixels, person boxes and masks, face boxes and landmarks, or the
motion since the keyframe before. What was not measured (age, gender, emotion, objects, actions) is never named, and a
measurement that lies between two words gives no sentence. Left and right are sides of the picture. A mirrored
keyframe gives the mirrored sentences.

This stands in for the vision-language model of the paper's appendix B; `CAPTIONER` says so in every caption.

Dimensions: height, width: pixels of the keyframe; row, column: the small grid on which scenes are measured;
pixel: a list of pixels; 3: red, green, blue, or CIELAB.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float, UInt8

from models.colors import (
    NEUTRAL_CHROMA,
    base_name,
    chroma_of,
    lab_of,
    measure_colors,
    name_main_colors,
    sum_shares,
)
from models.scene import (
    Box,
    Face,
    Person,
    Scene,
    find_body_areas,
    find_long_hair,
    find_person_pixels,
    find_skin,
    measure_facing,
)

CAPTIONER = "rules-1"

# Small spots of clear colour that are told, from this share of the scene on.
_SPOT_SHARE = 0.02
_MAX_SPOT_SHARE = 0.25
_SPOTS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
_COUNTS = ("No person is found", "One person is found", "Two persons are found", "Three persons are found",
           "Four persons are found")  # fmt: skip
# Face height as a share of the picture's height, from which on a shot has the name.
_SCALES = ((0.5, "a close-up"), (0.32, "a medium close-up"), (0.15, "a medium shot"), (0.07, "a full shot"))
_LONG_SHOT = "a long shot"
_MIN_FACE_PX = 16.0
_FACING_YAW = 0.16
_TURNED_YAW = 0.26
_PROFILE_YAW = 0.6
_TILT_DEG = 13.0
_SKIN_DISTANCE = 14.0
_MIN_CLOTHING_PX = 48


def caption_keyframe(
    scene: Scene, people: list[Person], motion: float | None, max_sentences: int, other_faces: Sequence[Face] = ()
) -> list[str]:
    """Describe a keyframe, the most telling facts first.

    Args:
        scene: From `measure_scene`.
        people: Everybody found, at most 5.
        motion: 0..1 since the keyframe before in the same shot; None where a shot begins.
        max_sentences: Facts beyond that are left out.
        other_faces: Faces that belong to none of the people; they count as persons.
    """
    faces = [*(person.face for person in people if person.face is not None), *other_faces]
    sentences = [
        *_describe_scale(scene, people, faces),
        _describe_count(len(people) + len(other_faces)),
        *_describe_light(scene),
        _describe_motion(motion),
        *_describe_colors(scene),
        *_describe_pairs(people),
        *_describe_halves(scene),
        *_describe_spots(scene),
        *_describe_sides(scene),
        *_describe_tint(scene),
        *_describe_contrast(scene),
        *_describe_detail(scene),
    ]
    return sentences[:max_sentences]


def caption_person(
    image: UInt8[np.ndarray, "height width 3"], scene: Scene, person: Person, max_sentences: int
) -> list[str]:
    """Describe one person: place, clothing, direction of the face, size; the most telling facts first."""
    name = person.name or "An unidentified person"
    sentences = [
        f"{name} is {_describe_place(scene, person)}.",
        *_describe_clothing(image, scene, person, name),
        *_describe_facing(person, name),
        *_describe_size(scene, person, name),
        *_describe_tilt(person),
        *_describe_face_light(image, person),
    ]
    return sentences[:max_sentences]


def _luma(scene: Scene) -> Float[np.ndarray, "row column"]:
    return scene.lab[..., 0] / 100


def _describe_scale(scene: Scene, people: list[Person], faces: list[Face]) -> list[str]:
    """Shot scale from the largest face; without faces only from a whole body."""
    if faces:
        share = max(face.box[3] - face.box[1] for face in faces) / scene.height_px
        return [f"This is {next((name for bound, name in _SCALES if share >= bound), _LONG_SHOT)}."]
    whole = [p.box for p in people if p.box[3] - p.box[1] > 2.0 * (p.box[2] - p.box[0])]
    if not whole:
        return []
    share = max(box[3] - box[1] for box in whole) / scene.height_px
    return [f"This is {'a full shot' if share >= 0.55 else _LONG_SHOT}."]


def _describe_count(count: int) -> str:
    return f"{_COUNTS[count]}." if count < len(_COUNTS) else "At least five persons are found."


def _describe_light(scene: Scene) -> list[str]:
    luma = _luma(scene)
    if _is_black(scene):
        return [f"The picture is {'black' if luma.max() < 0.1 else 'almost black'}."]
    if float(np.percentile(luma, 1)) > 0.97:
        return ["The picture is white."]
    words = ((0.14, "very dark"), (0.27, "dark"), (0.4, "dim"), (0.62, "of medium brightness"), (0.78, "bright"))
    return [f"The picture is {next((word for bound, word in words if luma.mean() < bound), 'very bright')}."]


def _is_black(scene: Scene) -> bool:
    return float(np.percentile(_luma(scene), 99)) < 0.08


def _describe_contrast(scene: Scene) -> list[str]:
    low, high = np.percentile(_luma(scene), [4, 96])
    if _is_black(scene) or low > 0.97:
        return []
    if high - low > 0.72:
        return ["The contrast is strong."]
    return ["The contrast is weak."] if high - low < 0.3 else []


def _describe_motion(motion: float | None) -> str:
    if motion is None:
        return "A new shot begins."
    words = (
        (0.008, "The picture is still since the keyframe before."),
        (0.03, "The picture moves a little since the keyframe before."),
        (0.1, "The picture moves since the keyframe before."),
    )
    return next(
        (word for bound, word in words if motion < bound), "The picture changes a lot since the keyframe before."
    )


def _describe_colors(scene: Scene) -> list[str]:
    """The colours of what is not a person."""
    if _is_black(scene):
        return []
    lab = scene.lab[scene.background]
    words = name_main_colors(measure_colors(lab), scene.colorless)
    sentences = [_describe_colorlessness(scene)] if scene.colorless else []
    return sentences + ([f"The scene is mostly {_join(words)}."] if words else [])


def _describe_colorlessness(scene: Scene) -> str:
    chroma = chroma_of(scene.lab.reshape(-1, 3))
    if np.median(chroma) >= NEUTRAL_CHROMA:
        return "The picture is tinted in one colour."
    low, high = np.percentile(_luma(scene), [4, 96])
    if high - low > 0.4 and np.median(chroma) < 1 and np.percentile(chroma, 98) < NEUTRAL_CHROMA:
        return "The picture is in black and white."
    return "The picture has almost no colour."


def _describe_spots(scene: Scene) -> list[str]:
    """Clear colours that cover a small part of the scene."""
    found = measure_colors(scene.lab[scene.background])
    if scene.colorless or _is_black(scene):
        return []
    main = {base_name(word) for word in name_main_colors(found, scene.colorless)}
    shares = sum_shares(found, scene.colorless)
    spots = [name for name in _SPOTS if name not in main and _SPOT_SHARE <= shares.get(name, 0.0) < _MAX_SPOT_SHARE]
    return [f"There is some {name} in the scene." for name in sorted(spots, key=lambda name: -shares[name])[:2]]


def _describe_tint(scene: Scene) -> list[str]:
    if scene.colorless or _is_black(scene):
        return []
    lab = scene.lab.reshape(-1, 3)
    chroma, yellowness = float(chroma_of(lab).mean()), float(lab[:, 2].mean())
    sentences = []
    if yellowness > 10 and float(lab[:, 1].mean()) > -3:
        sentences.append("The colours are warm.")
    elif yellowness < -4:
        sentences.append("The colours are cool.")
    if chroma > 24:
        sentences.append("The colours are strong.")
    elif chroma < 6:
        sentences.append("The colours are pale.")
    return sentences


def _describe_halves(scene: Scene) -> list[str]:
    """The leading colours of two halves, where they differ."""
    if _is_black(scene):
        return []
    rows, columns = scene.background.shape
    halves = {
        ("upper", "lower"): (np.s_[: rows // 2, :], np.s_[rows - rows // 2 :, :]),
        ("left", "right"): (np.s_[:, : columns // 2], np.s_[:, columns - columns // 2 :]),
    }
    for sides, areas in halves.items():
        first, second = (_lead(scene, area) for area in areas)
        if first is not None and second is not None and first != second:
            return [
                f"The {side} half of the scene is mostly {word}."
                for side, word in zip(sides, (first, second), strict=True)
            ]
    return []


def _lead(scene: Scene, area: tuple[slice, slice]) -> str | None:
    background = scene.background[area]
    if background.mean() < 0.25:
        return None
    found = measure_colors(scene.lab[area][background])
    words = name_main_colors(found, scene.colorless)
    return words[0] if words and sum_shares(found, scene.colorless)[base_name(words[0])] >= 0.4 else None


def _describe_sides(scene: Scene) -> list[str]:
    luma = _luma(scene)
    third = luma.shape[1] // 3
    if third == 0:
        return []
    left, right = float(luma[:, :third].mean()), float(luma[:, -third:].mean())
    if abs(left - right) < 0.12:
        return []
    sides = ("left", "right") if left > right else ("right", "left")
    return [f"The {sides[0]} side of the picture is brighter than the {sides[1]} side."]


def _describe_detail(scene: Scene) -> list[str]:
    if _is_black(scene):
        return []
    if scene.detail > 0.3:
        return ["The picture is full of fine detail."]
    return ["The picture is mostly smooth."] if scene.detail < 0.08 else []


def _describe_pairs(people: list[Person]) -> list[str]:
    """Who of the identified persons is beside whom, and whether they are turned towards each other."""
    named = sorted((p for p in people if p.name is not None), key=_center_x)
    sentences = []
    for left, right in pairwise(named):
        if _center_x(right) - _center_x(left) > 0.25 * max(left.box[2] - left.box[0], right.box[2] - right.box[0]):
            first, second = sorted((left, right), key=lambda person: (len(person.name or ""), person.name))
            side = "left" if first is left else "right"
            sentences.append(f"{first.name} is to the {side} of {second.name}.")
            if _turn(left) > _TURNED_YAW and _turn(right) < -_TURNED_YAW:
                sentences.append(f"{first.name} and {second.name} are turned towards each other.")
    return sentences


def _center_x(person: Person) -> float:
    box = person.face.box if person.face is not None else person.box
    return (box[0] + box[2]) / 2


def _turn(person: Person) -> float:
    return measure_facing(person.face)[0] if person.face is not None and _is_readable(person.face) else 0.0


def _is_readable(face: Face) -> bool:
    return min(face.box[2] - face.box[0], face.box[3] - face.box[1]) >= _MIN_FACE_PX


def _describe_place(scene: Scene, person: Person) -> str:
    share = _center_x(person) / scene.width_px
    if share < 0.2:
        return "far on the left"
    if share < 0.41:
        return "on the left"
    if share <= 0.59:
        return "in the centre"
    return "on the right" if share <= 0.8 else "far on the right"


def _describe_size(scene: Scene, person: Person, name: str) -> list[str]:
    share = (person.box[3] - person.box[1]) / scene.height_px
    if share > 0.8:
        return [f"{name} is large in the picture."]
    return [f"{name} is small in the picture."] if share < 0.4 else []


def _describe_facing(person: Person, name: str) -> list[str]:
    if person.face is None:
        return [f"No face is found on {name[0].lower() + name[1:] if person.name is None else name}."]
    if not _is_readable(person.face):
        return []
    yaw, _ = measure_facing(person.face)
    side = "right" if yaw > 0 else "left"
    if abs(yaw) < _FACING_YAW:
        return [f"{name} faces the camera."]
    if abs(yaw) < _TURNED_YAW:
        return []
    return [f"{name} is turned {'far ' if abs(yaw) > _PROFILE_YAW else ''}to the {side}."]


def _describe_tilt(person: Person) -> list[str]:
    if person.face is None or not _is_readable(person.face):
        return []
    yaw, roll = measure_facing(person.face)
    if roll is None or abs(yaw) > _PROFILE_YAW or abs(roll) < _TILT_DEG:
        return []
    return [f"The head of {_object_name(person)} is tilted to the {'right' if roll > 0 else 'left'}."]


def _object_name(person: Person) -> str:
    return person.name or "an unidentified person"


def _describe_face_light(image: UInt8[np.ndarray, "height width 3"], person: Person) -> list[str]:
    if person.face is None or not _is_readable(person.face) or abs(_turn(person)) > _FACING_YAW:
        return []
    (x0, y0, x1, y1), middle = person.face.box, float(person.face.landmarks[:3, 0].mean())
    width, height = x1 - x0, y1 - y0
    rows = slice(max(0, round(y0 + 0.25 * height)), max(0, round(y1 - 0.15 * height)))
    left = image[rows, max(0, round(x0 + 0.15 * width)) : max(0, round(middle))]
    right = image[rows, max(0, round(middle)) : max(0, round(x1 - 0.15 * width))]
    if left.size == 0 or right.size == 0:
        return []
    difference = float(lab_of(left.reshape(-1, 3))[:, 0].mean() - lab_of(right.reshape(-1, 3))[:, 0].mean())
    if abs(difference) < 12:
        return []
    return [f"The face of {_object_name(person)} is brighter on the {'left' if difference > 0 else 'right'}."]


def _describe_clothing(
    image: UInt8[np.ndarray, "height width 3"], scene: Scene, person: Person, name: str
) -> list[str]:
    upper, lower = find_body_areas(person)
    sentences = []
    for part, area in (("upper", upper), ("lower", lower)):
        words = _name_clothing(image, scene, person, area) if area is not None else []
        if words:
            sentences.append(f"{name} wears {_join(words)} clothing on the {part} body.")
    return sentences


def _name_clothing(image: UInt8[np.ndarray, "height width 3"], scene: Scene, person: Person, area: Box) -> list[str]:
    """Colours inside the person's mask and the area, without what looks like the face's skin or like long hair."""
    lab = pixels = find_person_pixels(image, person, area)
    hair = find_long_hair(image, person)
    if person.face is not None:
        # Long hair falls where little of the clothing is seen: what is left would be a guess.
        if len(hair) and area[3] - area[1] < 0.5 * (person.face.box[3] - person.face.box[1]):
            return []
        for sample in () if scene.colorless else (find_skin(image, person), hair):
            if len(sample):
                lab = lab[np.linalg.norm(lab - np.median(sample, axis=0), axis=1) > _SKIN_DISTANCE]
    if len(lab) < max(_MIN_CLOTHING_PX, 0.4 * len(pixels)):
        return []
    return name_main_colors(measure_colors(lab), scene.colorless)


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
