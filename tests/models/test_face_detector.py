from pathlib import Path

import cv2
import numpy as np
import pytest

from models import weights
from models.face_detector import CenterFace
from tests.models.test_person_detector import demo_frame


@pytest.fixture(scope="module")
def detector() -> CenterFace:
    return CenterFace()


def test_one_face_with_landmarks_in_order(detector: CenterFace) -> None:
    faces = detector.detect(demo_frame("carphone_pristine.mp4", 0), 0.5)
    assert len(faces) == 1
    (x0, y0, x1, y1), points = faces.boxes[0], faces.landmarks[0]
    assert ((points > [x0, y0]) & (points < [x1, y1])).all()
    left_eye, right_eye, nose, mouth_left, mouth_right = points
    assert left_eye[0] < nose[0] < right_eye[0] and mouth_left[0] < mouth_right[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(mouth_left[1], mouth_right[1])


def test_no_face_on_an_empty_street(detector: CenterFace) -> None:
    faces = detector.detect(demo_frame("bikes.mp4", 25), 0.5)
    assert len(faces) == 0 and faces.boxes.shape == (0, 4) and faces.landmarks.shape == (0, 5, 2)


def test_boxes_are_in_the_pixels_of_the_picture_given(detector: CenterFace) -> None:
    image = demo_frame("carphone_pristine.mp4", 0)
    twice = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    small, large = detector.detect(image, 0.5), detector.detect(twice, 0.5)
    np.testing.assert_allclose(large.boxes, small.boxes * 2, atol=6)
    np.testing.assert_allclose(large.landmarks, small.landmarks * 2, atol=6)


@pytest.mark.parametrize("shape", [(1, 1), (10, 700), (33, 65)])
def test_any_shape_of_picture_is_taken(detector: CenterFace, shape: tuple[int, int]) -> None:
    assert len(detector.detect(np.zeros((*shape, 3), np.uint8), 0.5)) == 0


def test_absent_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError, match="weights pull centerface"):
        CenterFace(tmp_path)
