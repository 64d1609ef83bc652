import av
import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models import weights
from models.rule_captioner import caption_keyframe, caption_person
from models.scene import Face, Person, find_long_hair, find_picture_area, measure_facing, measure_scene
from models.script import mirror_sentence

ALL = 99


def picture(color: tuple[int, int, int] = (90, 120, 60), height: int = 64, width: int = 96) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def landmarks(x: float, y: float, size: float, yaw: float = 0.0, roll_deg: float = 0.0) -> np.ndarray:
    points = np.array([[-0.5, -0.5], [0.5, -0.5], [yaw, 0.0], [-0.4, 0.5], [0.4, 0.5]]) * size
    angle = np.radians(roll_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points @ turn.T + (x, y)).astype(np.float32)


def person(
    box: tuple[float, float, float, float],
    name: str | None = "Person 1",
    face_px: float | None = None,
    yaw: float = 0.0,
    roll_deg: float = 0.0,
) -> Person:
    mask = np.full((int(np.ceil(box[3]) - np.floor(box[1])), int(np.ceil(box[2]) - np.floor(box[0]))), 255, np.uint8)
    face = None
    if face_px is not None:
        x, top = (box[0] + box[2]) / 2, box[1] + 2
        face = Face(
            (x - face_px * 0.4, top, x + face_px * 0.4, top + face_px),
            landmarks(x, top + face_px / 2, face_px / 3, yaw, roll_deg),
        )
    return Person(name, box, mask, face)


def caption(image: np.ndarray, people: list[Person], motion: float | None = None) -> list[str]:
    return caption_keyframe(measure_scene(image, people), people, motion, ALL)


def describe(image: np.ndarray, somebody: Person) -> list[str]:
    return caption_person(image, measure_scene(image, [somebody]), somebody, ALL)


@pytest.mark.parametrize(
    ("color", "sentences"),
    [
        ((0, 0, 0), ["The picture is black."]),
        ((255, 255, 255), ["The picture is white.", "The scene is mostly light."]),
        ((20, 60, 20), ["The picture is dark.", "The scene is mostly dark green."]),
        ((240, 200, 120), ["The picture is very bright.", "The colours are warm."]),
        ((90, 110, 160), ["The scene is mostly blue.", "The colours are cool."]),
        ((128, 128, 128), ["The picture has almost no colour.", "The scene is mostly mid-grey."]),
    ],
)
def test_plain_pictures_are_told_as_they_are(color: tuple[int, int, int], sentences: list[str]) -> None:
    image = picture(color)
    if color not in ((0, 0, 0), (255, 255, 255), (128, 128, 128)):
        image[:4, :20] = (200, 30, 30)  # a second colour, or the picture counts as tinted
    assert set(sentences) <= set(caption(image, []))


def test_a_black_picture_has_no_colors_and_no_contrast() -> None:
    assert caption(picture((0, 0, 0)), [], 0.0) == [
        "No person is found.",
        "The picture is black.",
        "The picture is still since the keyframe before.",
    ]


def test_a_black_and_white_picture_has_tones_but_no_colors() -> None:
    image = np.repeat(np.random.default_rng(1).choice(np.array([30, 130, 230], np.uint8), (64, 96, 1)), 3, axis=2)
    told = caption(image, [person((20, 8, 60, 60))])
    assert "The picture is in black and white." in told
    tinted = (image * [1.0, 0.9, 0.75]).astype(np.uint8)
    told_tinted = caption(tinted, [])
    assert "The picture is tinted in one colour." in told_tinted
    assert not any(color in " ".join(told + told_tinted) for color in ("brown", "beige", "yellow", "warm"))


@pytest.mark.parametrize(
    ("motion", "sentence"),
    [
        (None, "A new shot begins."),
        (0.0, "The picture is still since the keyframe before."),
        (0.02, "The picture moves a little since the keyframe before."),
        (0.06, "The picture moves since the keyframe before."),
        (0.3, "The picture changes a lot since the keyframe before."),
    ],
)
def test_motion_has_a_word(motion: float | None, sentence: str) -> None:
    assert sentence in caption(picture(), [], motion)


@pytest.mark.parametrize(
    ("face_share", "scale"),
    [
        (0.6, "a close-up"),
        (0.4, "a medium close-up"),
        (0.2, "a medium shot"),
        (0.1, "a full shot"),
        (0.04, "a long shot"),
    ],
)
def test_the_face_gives_the_shot_scale(face_share: float, scale: str) -> None:
    image = picture(height=400, width=600)
    assert caption(image, [person((200, 20, 400, 400), face_px=face_share * 400)])[0] == f"This is {scale}."


def test_scale_without_a_face_needs_a_whole_body() -> None:
    image = picture(height=200, width=300)
    assert caption(image, [person((100, 20, 160, 190), None)])[0] == "This is a full shot."
    assert caption(image, [person((100, 120, 120, 180), None)])[0] == "This is a long shot."
    assert caption(image, [person((100, 100, 200, 200), None)])[0] == "One person is found."


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (0, "No person is found."),
        (1, "One person is found."),
        (4, "Four persons are found."),
        (5, "At least five persons are found."),
    ],
)
def test_people_are_counted(count: int, sentence: str) -> None:
    people = [person((8 * i, 30, 8 * i + 8, 60), None) for i in range(count)]
    assert sentence in caption(picture(), people)


def test_a_face_without_a_person_counts() -> None:
    image = picture(height=400, width=600)
    scene = measure_scene(image, [])
    close = person((200, 20, 400, 400), face_px=240).face
    assert caption_keyframe(scene, [], None, 2, [close]) == ["This is a close-up.", "One person is found."]


@pytest.mark.parametrize(
    ("x", "place"),
    [
        (10, "far on the left"),
        (30, "on the left"),
        (50, "in the centre"),
        (70, "on the right"),
        (90, "far on the right"),
    ],
)
def test_a_person_has_a_place(x: int, place: str) -> None:
    image = picture(height=60, width=100)
    assert describe(image, person((x - 5, 20, x + 5, 50), None))[0] == f"An unidentified person is {place}."


@pytest.mark.parametrize(
    ("yaw", "sentence"),
    [
        (0.0, "Person 1 faces the camera."),
        (-0.4, "Person 1 is turned to the left."),
        (0.4, "Person 1 is turned to the right."),
        (0.9, "Person 1 is turned far to the right."),
    ],
)
def test_the_nose_gives_the_facing(yaw: float, sentence: str) -> None:
    assert sentence in describe(picture(height=200, width=300), person((100, 0, 200, 200), face_px=60, yaw=yaw))


def test_a_facing_between_two_words_or_too_small_is_not_told() -> None:
    image = picture(height=200, width=300)
    for somebody in (person((100, 0, 200, 200), face_px=60, yaw=0.2), person((100, 0, 200, 200), face_px=15)):
        assert not any("turned" in s or "camera" in s for s in describe(image, somebody))


def test_a_profile_is_told_from_eyes_that_meet() -> None:
    points = np.array([[24, 25], [25, 25], [11, 30], [20, 40], [21, 40]], np.float32)
    yaw, roll = measure_facing(Face((0, 0, 50, 50), points))
    assert yaw < -0.6
    assert roll is None


@given(st.floats(-0.5, 0.5), st.floats(-40, 40))
def test_facing_is_measured_whatever_the_tilt(yaw: float, roll_deg: float) -> None:
    measured = measure_facing(Face((0, 0, 100, 100), landmarks(50, 50, 30, yaw, roll_deg)))
    assert measured == pytest.approx((yaw, roll_deg), abs=1e-3)


@pytest.mark.parametrize(("roll_deg", "side"), [(-25, "left"), (25, "right")])
def test_a_tilted_head_is_told(roll_deg: float, side: str) -> None:
    told = describe(picture(height=200, width=300), person((100, 0, 200, 200), face_px=60, roll_deg=roll_deg))
    assert f"The head of Person 1 is tilted to the {side}." in told


def dressed() -> tuple[np.ndarray, Person]:
    """Somebody in a red top and blue trousers before a green wall."""
    image = picture((60, 140, 60), height=400, width=300)
    image[20:60, 130:170] = (225, 170, 140)
    image[60:200, 100:200] = (180, 20, 30)
    image[200:400, 110:190] = (30, 40, 140)
    return image, person((100, 10, 200, 400), face_px=40)


def test_clothing_is_named_by_its_colors() -> None:
    image, somebody = dressed()
    told = describe(image, somebody)
    assert "Person 1 wears red clothing on the upper body." in told
    assert any(sentence.startswith("Person 1 wears dark blue") and "lower" in sentence for sentence in told)
    assert "The scene is mostly green." in caption(image, [somebody])


def test_the_scene_is_what_is_not_a_person() -> None:
    image = picture((60, 140, 60))
    image[:, 20:80] = (200, 30, 30)
    assert "The scene is mostly red and green." in caption(image, [])
    assert "The scene is mostly green." in caption(image, [person((20, 0, 80, 64), None)])


def test_long_hair_is_not_clothing() -> None:
    image, somebody = dressed()
    image[20:64, 100:200] = (60, 40, 25)
    image[20:60, 134:166] = (225, 170, 140)
    close = image[:64]
    assert not any("wears" in sentence for sentence in describe(close, person((100, 10, 200, 64), face_px=40)))
    assert "Person 1 wears red clothing on the upper body." in describe(image, somebody)


def test_bare_skin_is_not_clothing() -> None:
    image, somebody = dressed()
    image[60:200, 100:200] = (225, 170, 140)
    assert not any("upper body" in sentence for sentence in describe(image, somebody))


def test_clothing_outside_of_the_mask_or_the_picture_is_not_named() -> None:
    image, somebody = dressed()
    empty = Person("Person 1", somebody.box, np.zeros_like(somebody.mask), somebody.face)
    assert not any("wears" in sentence for sentence in describe(image, empty))
    cut = image[:70]
    assert not any("wears" in sentence for sentence in describe(cut, person((100, 10, 200, 70), face_px=55)))


def test_persons_stand_in_relation_to_each_other() -> None:
    image = picture(height=200, width=300)
    left = person((20, 0, 120, 200), "Person 2", face_px=60, yaw=0.5)
    right = person((180, 0, 280, 200), "Person 1", face_px=60, yaw=-0.5)
    told = caption(image, [left, right])
    assert "Person 1 is to the right of Person 2." in told
    assert "Person 1 and Person 2 are turned towards each other." in told


def test_black_bars_do_not_count() -> None:
    image = picture((200, 180, 60), height=100, width=160)
    image[:15] = image[-15:] = 0
    assert find_picture_area(image) == (15, 85, 0, 160)
    assert not any("dark" in sentence for sentence in caption(image, []))
    image[15:60] = 0
    assert find_picture_area(image) == (0, 100, 0, 160)


def test_halves_sides_and_spots() -> None:
    image = picture((120, 180, 230), height=60, width=96)
    image[30:] = (90, 130, 50)
    image[40:50, 40:60] = (220, 30, 30)
    told = caption(image, [])
    assert "The upper half of the scene is mostly light blue." in told
    assert "The lower half of the scene is mostly green." in told
    assert "There is some red in the scene." in told
    image[:, :30] = 0
    assert "The right side of the picture is brighter than the left side." in caption(image, [])


def test_limits_keep_the_first_sentences() -> None:
    image, somebody = dressed()
    scene = measure_scene(image, [somebody])
    assert caption_keyframe(scene, [somebody], None, 3) == caption_keyframe(scene, [somebody], None, ALL)[:3]
    assert caption_person(image, scene, somebody, 2) == caption_person(image, scene, somebody, ALL)[:2]


def test_a_mask_that_does_not_fit_its_box_is_refused() -> None:
    wrong = Person("Person 1", (10.5, 10, 30, 40), np.zeros((30, 19), np.uint8), None)
    with pytest.raises(ValueError, match=r"mask is 19x30 pixels.*20x30"):
        measure_scene(picture(), [wrong])


def flip(image: np.ndarray, somebody: Person) -> Person:
    width = image.shape[1]
    x0, y0, x1, y1 = somebody.box
    face = somebody.face
    if face is not None:
        points = face.landmarks[[1, 0, 2, 4, 3]] * [-1, 1] + [width, 0]
        face = Face((width - face.box[2], face.box[1], width - face.box[0], face.box[3]), points.astype(np.float32))
    return Person(somebody.name, (width - x1, y0, width - x0, y1), somebody.mask[:, ::-1].copy(), face)


def test_hair_of_two_colours_is_the_same_hair_in_the_mirror() -> None:
    somebody = person((5, 5, 35, 64), face_px=24)
    image = picture((20, 0, 0), height=64, width=96)
    image[:, 20:] = (0, 20, 0)
    hair = find_long_hair(image, somebody)
    mirrored = find_long_hair(image[:, ::-1].copy(), flip(image, somebody))
    assert len(np.unique(hair, axis=0)) == 2
    assert sorted(map(tuple, hair)) == sorted(map(tuple, mirrored))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    hnp.arrays(np.uint8, (8, 12, 3)),
    st.integers(5, 70),
    st.floats(-0.9, 0.9),
    st.floats(-30, 30),
    st.booleans(),
)
def test_a_mirrored_keyframe_has_the_mirrored_caption(
    blocks: np.ndarray, x: int, yaw: float, roll_deg: float, has_face: bool
) -> None:
    image = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    box = (float(x), 5.0, float(min(95, x + 30)), 64.0)
    people = [person(box, face_px=24 if has_face else None, yaw=yaw, roll_deg=roll_deg), person((0, 20, 13, 50), None)]
    flipped = [flip(image, somebody) for somebody in people]
    mirror_image = image[:, ::-1].copy()
    expected = {mirror_sentence(sentence) for sentence in caption(image, people)}
    assert set(caption(mirror_image, flipped)) == expected
    for somebody, other in zip(people, flipped, strict=True):
        assert describe(mirror_image, other) == [mirror_sentence(sentence) for sentence in describe(image, somebody)]


def test_a_real_keyframe_is_told_truly() -> None:
    """A man in a dark suit in a car, checked by eye; face and outline drawn by hand."""
    film = weights.folder("demo_films") / "carphone_pristine.mp4"
    with av.open(str(film)) as container:
        image = next(f for i, f in enumerate(container.decode(video=0)) if i == 40).to_ndarray(format="rgb24")
    points = np.array([[60.6, 64.2], [81.3, 58.4], [73.6, 73.2], [69, 85], [88, 80]], np.float32)
    mask = np.zeros((127, 154), np.uint8)
    outline = np.array([[33, 9], [52, 9], [60, 60], [85, 75], [148, 85], [153, 126], [10, 126], [15, 100], [35, 80]])
    cv2.fillPoly(mask, [outline.astype(np.int32)], 255)
    man = Person("Person 1", (22.0, 17.0, 176.0, 144.0), mask, Face((49, 39, 102, 102), points))
    scene = measure_scene(image, [man])
    told = caption_keyframe(scene, [man], 0.05, ALL) + caption_person(image, scene, man, ALL)
    assert {
        "This is a medium close-up.",
        "One person is found.",
        "The picture is of medium brightness.",
        "The picture moves since the keyframe before.",
        "There is some blue in the scene.",
        "Person 1 is in the centre.",
        "Person 1 faces the camera.",
        "The head of Person 1 is tilted to the left.",
        "Person 1 is large in the picture.",
    } <= set(told)
    clothing = next(sentence for sentence in told if "wears" in sentence)
    assert "black" in clothing and "upper body" in clothing
