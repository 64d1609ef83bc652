from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import weights
from models.face_detector import CenterFace
from models.face_embedder import (
    _REFERENCE_PX,
    DlibFace,
    align_face,
    measure_sharpness,
    similarity_transform,
)
from tests.models.test_person_detector import demo_frame


@given(st.floats(-3, 3), st.floats(0.05, 20), st.floats(-500, 500), st.floats(-500, 500))
def test_the_transform_undoes_any_turn_scale_and_shift(angle: float, scale: float, x: float, y: float) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = _REFERENCE_PX @ turn.T + [x, y]
    matrix = similarity_transform(moved, _REFERENCE_PX)
    np.testing.assert_allclose(moved @ matrix[:, :2].T + matrix[:, 2], _REFERENCE_PX, atol=1e-3)


def test_points_that_coincide_do_not_divide_by_zero() -> None:
    assert np.isfinite(similarity_transform(np.ones((5, 2)), _REFERENCE_PX)).all()


def test_reference_points_are_a_face_inside_the_chip() -> None:
    assert (_REFERENCE_PX > 30).all() and (_REFERENCE_PX < 120).all()
    assert abs(_REFERENCE_PX[0, 1] - _REFERENCE_PX[1, 1]) < 1e-3


def test_alignment_puts_the_eyes_where_dlib_has_them() -> None:
    image = np.zeros((400, 400, 3), np.uint8)
    landmarks = _REFERENCE_PX * 1.7 + [40, 60]
    cv2.circle(image, tuple(int(v) for v in landmarks[0].round()), 8, (255, 255, 255), -1)
    chip = align_face(image, landmarks)
    rows, columns = np.nonzero(chip[..., 0] > 128)
    np.testing.assert_allclose([columns.mean(), rows.mean()], _REFERENCE_PX[0], atol=1)


def test_sharpness_falls_with_blur() -> None:
    chip = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    blurred = cv2.GaussianBlur(chip, (0, 0), 3)
    assert measure_sharpness(chip) > 10 * measure_sharpness(blurred) > 0
    assert measure_sharpness(np.full((150, 150, 3), 7, np.uint8)) == 0


def test_one_man_is_near_himself_and_far_from_another() -> None:
    detector, embedder = CenterFace(), DlibFace()
    chips = []
    for name, index in (("carphone_pristine.mp4", 0), ("carphone_pristine.mp4", 100), ("bikes.mp4", 125)):
        image = demo_frame(name, index)
        chips.append(align_face(image, detector.detect(image, 0.5).landmarks[0]))
    first, later, cyclist = embedder.embed(chips)
    assert first.shape == (128,) and first.dtype == np.float32
    assert np.linalg.norm(first - later) < 0.45
    assert np.linalg.norm(first - cyclist) > 0.6


def test_no_faces_give_an_empty_array() -> None:
    assert DlibFace().embed([]).shape == (0, 128)


def test_absent_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError, match="weights pull dlib_face"):
        DlibFace(tmp_path)
