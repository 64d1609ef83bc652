import itertools
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import weights
from models.person_detector import Convolution, PersonDetector, _fuse, _place, _windows
from models.regions import overlaps


@pytest.fixture(scope="module")
def detector() -> PersonDetector:
    return PersonDetector()


def demo_frame(name: str, index: int) -> np.ndarray:
    with av.open(str(weights.folder("demo_films") / name)) as film:
        for i, frame in enumerate(film.decode(video=0)):
            if i == index:
                return frame.to_ndarray(format="rgb24")
    raise AssertionError(f"{name} has no frame {index}")


def test_the_cyclist_is_found_where_he_stands(detector: PersonDetector) -> None:
    persons = detector.detect(demo_frame("bikes.mp4", 125), 0.35)
    assert len(persons.boxes) == 1
    cyclist = np.array([[350, 5, 495, 268]], np.float32)
    assert overlaps(persons.boxes, cyclist)[0, 0] > 0.8


def test_a_street_without_people_and_a_cartoon_rabbit_give_nothing(detector: PersonDetector) -> None:
    for name, index in (("bikes.mp4", 25), ("bigbuckbunny.mp4", 0)):
        assert len(detector.detect(demo_frame(name, index), 0.35).scores) == 0


def test_boxes_lie_in_the_picture_and_scores_fall(detector: PersonDetector) -> None:
    image = demo_frame("carphone_pristine.mp4", 40)
    persons = detector.detect(image, 0.05)
    assert (persons.boxes[:, :2] >= 0).all() and (persons.boxes[:, 2:] <= [image.shape[1], image.shape[0]]).all()
    assert (np.diff(persons.scores) <= 0).all() and persons.scores.min() >= 0.05
    assert persons.boxes.dtype == np.float32


def test_a_mirrored_picture_gives_mirrored_persons(detector: PersonDetector) -> None:
    image = demo_frame("bikes.mp4", 125)
    persons = detector.detect(image, 0.35)
    mirrored = detector.detect(np.ascontiguousarray(image[:, ::-1]), 0.35)
    x0, y0, x1, y1 = mirrored.boxes.T
    np.testing.assert_allclose(np.stack([640 - x1, y0, 640 - x0, y1], axis=1), persons.boxes, atol=0.5)
    np.testing.assert_allclose(mirrored.scores, persons.scores, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (40, 900), (900, 40), (300, 300)])
def test_any_shape_of_picture_is_taken(detector: PersonDetector, shape: tuple[int, int]) -> None:
    persons = detector.detect(np.zeros((*shape, 3), np.uint8), 0.35)
    assert persons.boxes.shape == (0, 4)


@pytest.mark.parametrize("size,stride,kernel", [(300, 2, 3), (19, 2, 3), (10, 1, 3), (5, 2, 3), (7, 1, 1)])
def test_same_padding_puts_the_odd_pixel_last(size: int, stride: int, kernel: int) -> None:
    convolution = Convolution(torch.ones(1, 1, kernel, kernel), torch.zeros(1), stride, relu=False)
    x = torch.rand(1, 1, size, size)
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), convolution.weight, stride=stride)
    assert expected.shape[-1] == out
    torch.testing.assert_close(convolution(x), expected)


def test_windows_cover_a_long_picture_and_leave_a_short_one_whole() -> None:
    assert _windows(640, 360) == [(0, 0, 640, 360)]
    assert _windows(800, 332) == [(0, 0, 800, 332), (0, 0, 498, 332), (302, 0, 800, 332)]
    tall = _windows(100, 1000)
    assert tall[1][1] == 0 and tall[-1][3] == 1000
    assert all(a[3] >= b[1] for a, b in itertools.pairwise(tall[1:]))


def test_two_looks_at_a_person_average_and_one_look_halves() -> None:
    first = (np.array([[0.0, 0, 0.5, 1]]), np.array([0.8]))
    second = (np.array([[0.02, 0, 0.5, 1], [0.7, 0, 0.9, 1]]), np.array([0.4, 0.6]))
    boxes, scores = _fuse(first, second)
    np.testing.assert_allclose(scores, [0.6, 0.3])
    np.testing.assert_allclose(boxes[0, 0], 0.02 / 3)


def test_a_person_cut_by_an_inner_edge_is_left_to_another_window() -> None:
    boxes = np.array([[0.0, 0, 0.3, 1], [0.2, 0, 0.4, 1]])
    placed, scores = _place(boxes, np.array([0.9, 0.5]), (302, 0, 800, 332), 800, 332)
    np.testing.assert_allclose(scores, [0.5])
    np.testing.assert_allclose(placed, [[302 + 0.2 * 498, 0, 302 + 0.4 * 498, 332]], rtol=1e-5)


def test_absent_weights_name_the_command_that_fetches_them(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError, match="moviedreamer weights pull ssdlite_person"):
        PersonDetector(tmp_path)
