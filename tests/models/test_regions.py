import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import weights
from models.regions import SelfieSegmentation, areas, contained, overlaps, round_out, suppress
from tests.models.test_person_detector import demo_frame

boxes = st.lists(
    st.tuples(*[st.floats(0, 100)] * 2, *[st.floats(1, 50)] * 2).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])),
    min_size=1,
    max_size=8,
).map(np.array)


def test_overlap_of_known_boxes() -> None:
    a, b = np.array([[0.0, 0, 10, 10]]), np.array([[5.0, 0, 15, 10], [20, 20, 30, 30], [2, 2, 4, 4]])
    np.testing.assert_allclose(overlaps(a, b), [[50 / 150, 0, 4 / 100]])
    np.testing.assert_allclose(contained(b, a), [[0.5], [0], [1]])
    assert areas(np.array([[3.0, 3, 1, 5]])) == 0


@given(boxes)
@settings(deadline=None)
def test_overlap_is_symmetric_and_one_with_itself(some: np.ndarray) -> None:
    overlap = overlaps(some, some)
    np.testing.assert_allclose(overlap, overlap.T)
    np.testing.assert_allclose(np.diag(overlap), 1)


@given(boxes, st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_suppression_keeps_the_best_and_no_two_that_overlap(some: np.ndarray, seed: int) -> None:
    scores = np.random.default_rng(seed).random(len(some))
    kept = suppress(some, scores, 0.4)
    assert kept[0] == scores.argmax()
    assert (np.diff(scores[kept]) <= 0).all()
    overlap = overlaps(some[kept], some[kept]) - np.eye(len(kept))
    assert (overlap <= 0.4 + 1e-9).all()
    dropped = np.setdiff1d(np.arange(len(some)), kept)
    assert (overlaps(some[dropped], some[kept]).max(axis=1, initial=0) > 0.4).all()


def test_suppression_of_nothing() -> None:
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.5).shape == (0,)


@pytest.mark.parametrize(
    "box,expected",
    [
        ((1.2, 2.8, 3.1, 4.0), (1, 2, 4, 4)),
        ((-5, -5, 200, 200), (0, 0, 100, 50)),
        ((99.9, 49.9, 99.9, 49.9), (99, 49, 100, 50)),
        ((120, 60, 130, 70), (99, 49, 100, 50)),
    ],
)
def test_round_out_stays_in_the_picture_and_is_never_empty(box: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert round_out(np.array(box, np.float32), 100, 50) == expected


def test_the_mask_covers_the_man_and_not_the_corner() -> None:
    image = demo_frame("carphone_pristine.mp4", 0)
    box = np.array([28.4, 15.2, 175, 142], np.float32)
    (mask,) = SelfieSegmentation().segment(image, box[None])
    assert mask.shape == (142 - 15, 175 - 28) and mask.dtype == np.uint8
    face = mask[80 - 15 : 90 - 15, 80 - 28 : 95 - 28]
    corner = mask[:15, -25:]
    assert face.mean() > 230 and corner.mean() < 25


def test_a_box_of_one_pixel_has_a_mask() -> None:
    image = np.zeros((30, 40, 3), np.uint8)
    (mask,) = SelfieSegmentation().segment(image, np.array([[3, 3, 4, 4]], np.float32))
    assert mask.shape == (1, 1)


def test_absent_weights_are_named(tmp_path) -> None:
    with pytest.raises(weights.WeightsError, match="weights pull selfie_segmentation"):
        SelfieSegmentation(tmp_path)
