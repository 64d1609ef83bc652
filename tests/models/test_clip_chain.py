import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.clip_chain import Frame, chain_clips, compare, sample_frames
from models.video_diffusion import ClipSettings, VideoDiffusion
from tests.tiny_checkpoints import save_svd

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ClipSettings(frames=3, height_px=64, width_px=64, steps=1, decode_frames=3)
KEYFRAME = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VideoDiffusion:
    return VideoDiffusion(save_svd(tmp_path_factory.mktemp("svd")))


def chain(model, count: int, reanchor_below: float | None = None, seed: int = 5):
    made = []
    frames = chain_clips(model, KEYFRAME, SETTINGS, seed=seed, reanchor_below=reanchor_below, made=made)
    return list(itertools.islice(frames, count)), made


def test_a_chained_clip_starts_at_the_last_frame_under_the_keyframes_feature(model):
    frames, made = chain(model, 5)
    anchor = model.embed(KEYFRAME)
    first = model.generate(KEYFRAME, anchor, SETTINGS, 5)
    second = model.generate(first[-1], anchor, SETTINGS, 6)
    for frame, wanted in zip(frames, [KEYFRAME, first[1], first[2], second[1], second[2]], strict=True):
        assert np.array_equal(frame.picture, wanted) and not frame.cut
    assert not np.array_equal(second, model.generate(first[-1], model.embed(first[-1]), SETTINGS, 6)), "no anchor"
    assert [(c.begins, c.position, c.seed) for c in made] == [("keyframe", 0, 5), ("last_frame", 2, 6)]


def test_the_drift_of_a_clip_is_the_cosine_between_its_last_frame_and_the_keyframe(model):
    frames, made = chain(model, 5)
    anchor = model.embed(KEYFRAME)
    for clip, last in zip(made, (frames[2], frames[4]), strict=True):
        feature = model.embed(last.picture)
        wanted = anchor @ feature / np.linalg.norm(anchor) / np.linalg.norm(feature)
        assert clip.similarity == pytest.approx(wanted, abs=1e-6) and -1 <= clip.similarity <= 1


def test_a_chain_that_drifted_starts_anew_at_the_keyframe_after_a_cut(model):
    _, straight = chain(model, 5)
    frames, made = chain(model, 9, reanchor_below=1.0)
    anchor = model.embed(KEYFRAME)
    assert [(c.begins, c.position) for c in made] == [("keyframe", 0), ("anchor", 3), ("anchor", 6)]
    second = model.generate(KEYFRAME, anchor, SETTINGS, 6)
    assert all(np.array_equal(frame.picture, wanted) for frame, wanted in zip(frames[3:6], second, strict=True))
    assert [frame.cut for frame in frames] == [place in (3, 6) for place in range(9)]
    assert made[0] == straight[0]


def test_a_chain_goes_on_where_it_did_not_drift_far(model):
    _, straight = chain(model, 5)
    below = min(clip.similarity for clip in straight) - 1e-6
    assert chain(model, 5, reanchor_below=below)[1] == straight


def test_no_clip_is_made_before_it_is_asked_for(model):
    assert chain(model, 1)[1] == []
    assert len(chain(model, 3)[1]) == 1


def test_steps_are_told_with_the_number_of_their_clip(model):
    told = []
    report = lambda clip, step: told.append((clip, step))  # noqa: E731
    frames = chain_clips(model, KEYFRAME, SETTINGS, seed=0, reanchor_below=None, made=[], report=report)
    list(itertools.islice(frames, 5))
    assert told == [(0, 1), (1, 1)]


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5), st.integers(0, 99))
def test_similarity_is_a_cosine(values, seed):
    first = np.array(values, np.float32)
    second = np.random.default_rng(seed).normal(size=len(values)).astype(np.float32)
    assert -1 <= compare(first, second) <= 1
    if np.linalg.norm(first.astype(float)) > 0:
        assert compare(first, first) == pytest.approx(1)
        assert compare(first, -first) == pytest.approx(-1)


def shade(value: int) -> np.ndarray:
    return np.full((32, 48, 3), value, np.uint8)


@given(st.lists(st.fractions(0, 9), min_size=1, max_size=30), st.sets(st.integers(1, 9)))
def test_sampled_frames_lie_between_their_neighbours_and_never_across_a_cut(times, cuts):
    times = sorted(float(time) for time in times)
    taken = []

    def stream():
        for index in range(10):
            taken.append(index)
            yield Frame(shade(20 * index), cut=index in cuts)

    found = list(sample_frames(stream(), times))
    assert len(found) == len(times) and taken[-1] <= max(0, np.ceil(times[-1]))
    for picture, time in zip(found, times, strict=True):
        before = int(time)
        wanted = 20 * before if before + 1 in cuts else 20 * time
        assert np.abs(picture.astype(float) - wanted).max() <= 1.5
        if time == before:
            assert np.array_equal(picture, shade(20 * before))
