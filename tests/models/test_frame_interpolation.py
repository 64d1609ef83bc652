import itertools

import av
import cv2
import numpy as np
import pytest
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from models import frame_interpolation, weights
from models.frame_interpolation import MINIMUM_TRUST, Interpolator, cross_blend, measure_trust, splat


def draw_texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise at several scales, as pictures of the world have it."""
    rng = np.random.default_rng(seed)
    layers = [
        scale * cv2.resize(rng.normal(size=(height // scale + 2, width // scale + 2, 3)), (width, height))
        for scale in (4, 8, 16, 32)
    ]
    texture = sum(layers)
    return np.clip(128 + 50 * texture / texture.std(), 0, 255).astype(np.uint8)


def pan(offset_x: int, offset_y: int = 0) -> np.ndarray:
    """A window that moves over a large texture."""
    return np.ascontiguousarray(draw_texture(192, 300)[30 + offset_y : 126 + offset_y, 40 + offset_x : 200 + offset_x])


def error(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(int) - second).mean())


def test_times_zero_and_one_are_the_keyframes_themselves():
    pair = Interpolator(pan(0), pan(8))
    assert np.array_equal(pair.at(0), pan(0)) and np.array_equal(pair.at(1), pan(8))


@pytest.mark.parametrize("time", [0.25, 0.5, 0.75])
def test_a_moving_camera_is_followed(time):
    first, last, between = pan(0), pan(16, 8), pan(round(16 * time), round(8 * time))
    found = Interpolator(first, last).at(time)
    inside = (slice(12, -12), slice(20, -20))  # what enters or leaves the picture cannot be known
    blend = cross_blend(first, last, time)
    assert error(found[inside], between[inside]) < 0.25 * error(blend[inside], between[inside])


def test_a_moving_object_leaves_the_background_alone():
    background, thing = draw_texture(96, 160), draw_texture(24, 24, seed=9)
    pictures = [background.copy() for _ in range(3)]
    for picture, x in zip(pictures, (50, 58, 66), strict=True):
        picture[36:60, x : x + 24] = thing
    first, between, last = pictures
    found = Interpolator(first, last).at(0.5)
    there, blend = (slice(40, 56), slice(62, 78)), cross_blend(first, last, 0.5)
    assert error(found[there], between[there]) < 0.5 * error(blend[there], between[there])
    assert error(found[:20], background[:20]) < 2


def test_pictures_without_a_common_scene_are_cross_blended():
    first, last = draw_texture(96, 160), draw_texture(96, 160, seed=1)
    pair = Interpolator(first, last)
    assert pair.trust < MINIMUM_TRUST
    assert np.array_equal(pair.at(0.3), cross_blend(first, last, 0.3))


def test_a_fade_stays_a_fade():
    first, last = draw_texture(96, 160), np.zeros((96, 160, 3), np.uint8)
    assert error(Interpolator(first, last).at(0.5), cross_blend(first, last, 0.5)) < 6


def test_equal_keyframes_stay_still():
    assert error(Interpolator(pan(0), pan(0)).at(0.5), pan(0)) < 0.5


def test_real_motion_is_nearer_to_the_film_than_a_cross_blend():
    with av.open(str(weights.folder("demo_films") / "bikes.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in itertools.islice(film.decode(video=0), 50)]
    found, wanted = Interpolator(frames[40], frames[48]).at(0.5), frames[44]
    assert error(found, wanted) < 0.9 * error(cross_blend(frames[40], frames[48], 0.5), wanted)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0, 1))
def test_any_size_gives_a_picture_of_that_size(height, width, time):
    rng = np.random.default_rng(height * width)
    first, last = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    found = Interpolator(first, last).at(time)
    assert found.shape == first.shape and found.dtype == np.uint8


def test_the_number_of_threads_does_not_change_the_picture():
    before = cv2.getNumThreads()
    results = []
    for threads in (1, 4):
        cv2.setNumThreads(threads)
        results.append(Interpolator(pan(0), pan(9, 5)).at(0.4))
        assert cv2.getNumThreads() == threads
    cv2.setNumThreads(before)
    assert np.array_equal(*results)


def test_splat_carries_flow_to_where_it_leads():
    flow, trust = np.zeros((20, 30, 2), np.float32), np.ones((20, 30), np.float32)
    flow[..., 0] = 8
    carried, landed = splat(flow, trust, 0.5)
    assert landed[:, :4].max() == 0 and landed[:, 4:].min() == pytest.approx(1)
    assert np.allclose(carried, flow, atol=1e-3)


def test_trust_needs_brightness_and_the_way_back_to_agree():
    gray, still = np.full((8, 10), 100, np.uint8), np.zeros((8, 10, 2), np.float32)
    assert measure_trust(gray, gray, still, still).min() == 1
    assert measure_trust(gray, gray + 80, still, still).max() < 0.01
    assert measure_trust(gray, gray, still, still + 4).max() < 0.01
    outwards = still + np.float32(20)
    assert measure_trust(gray, gray, outwards, -outwards).max() == 0


def test_shapes_hold_under_the_type_checker():
    checked = jaxtyped(typechecker=beartype)(frame_interpolation.cross_blend)
    assert checked(pan(0), pan(1), 0.5).shape == (96, 160, 3)


def test_two_sizes_are_refused():
    with pytest.raises(ValueError, match="same size"):
        Interpolator(pan(0), pan(0)[:-2])


@pytest.mark.parametrize("time", [-0.1, 1.1, float("nan")])
def test_a_time_outside_the_pair_is_refused(time):
    with pytest.raises(ValueError, match="expected 0"):
        Interpolator(pan(0), pan(0)).at(time)
