"""Sampling from a tiny story model: the cache, windows, history, references, seed and temperature."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.generation import generate
from models.sequence import Frame
from tests.models.test_autoregressive import CONFIG, log_likelihood, make_frames, make_model


def scripts_only(frames: list[Frame]) -> list[Frame]:
    return [replace(frame, tokens=None) for frame in frames]


@pytest.mark.parametrize("history", [0, 3])
@pytest.mark.parametrize("carry", [False, True])
def test_cache_changes_nothing(history: int, carry: bool) -> None:
    model, frames = make_model(replace(CONFIG, carry_previous=carry)), scripts_only(make_frames(7))
    settings = {"history": make_frames(history, seed=3), "references": [make_frames(1, seed=4)[0].tokens], "seed": 2}
    settings |= {"window_frames": 4, "overlap_frames": 2}
    cached, plain = (generate(model, frames, **settings, use_cache=flag) for flag in (True, False))
    assert cached.shape == (7, 2, 3)
    np.testing.assert_allclose(cached, plain, atol=1e-5)


def test_seed_and_temperature() -> None:
    model, frames = make_model(), scripts_only(make_frames(3))
    first, again, other = (generate(model, frames, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.isclose(first, other).all(-1).any()


def test_cold_samples_are_likely() -> None:
    model, frames = make_model(), make_frames(4)

    def mean_likelihood(temperature: float) -> float:
        made = [generate(model, frames, temperature=temperature, seed=seed) for seed in range(5)]
        filled = [[replace(f, tokens=t) for f, t in zip(frames, tokens, strict=True)] for tokens in made]
        return float(np.mean([log_likelihood(model, f).mean().item() for f in filled]))

    assert mean_likelihood(0.1) > mean_likelihood(1.0) > mean_likelihood(3.0)


def test_history_references_and_scripts_all_matter() -> None:
    model, frames = make_model(), scripts_only(make_frames(2))
    plain = generate(model, frames)
    past, tokens = make_frames(2, seed=9), [make_frames(1, seed=8)[0].tokens]
    other = [replace(frame, sentences=frame.sentences + 1) for frame in frames]
    for made in (
        generate(model, frames, history=past),
        generate(model, frames, references=tokens),
        generate(model, other),
    ):
        assert not np.isclose(made, plain).all(-1).any()


def test_a_story_longer_than_the_window_goes_on_from_the_overlap() -> None:
    """The frame after a restart depends on the overlap and on nothing older."""
    model, frames = make_model(), scripts_only(make_frames(5))
    settings = {"window_frames": 4, "overlap_frames": 2, "temperature": 0.0}
    made = generate(model, frames, **settings)
    past = [replace(frame, tokens=tokens) for frame, tokens in zip(frames, made, strict=True)]
    restarted = make_model()  # temperature 0 still draws components: compare where one component is sure
    for m in (model, restarted):
        with torch.no_grad():
            m.head.bias[0] = 100.0
    made = generate(model, frames, **settings)
    past = [replace(frame, tokens=tokens) for frame, tokens in zip(frames, made, strict=True)]
    next_window = generate(restarted, frames[4:], history=past[2:4], **settings)
    np.testing.assert_allclose(next_window[0], made[4], atol=1e-5)
    whole = generate(model, frames, window_frames=5, overlap_frames=2, temperature=0.0)
    np.testing.assert_allclose(whole[:4], made[:4], atol=1e-5)
    assert not np.allclose(whole[4], made[4])


@pytest.mark.parametrize("overlap", [-1, 4])
def test_overlap_must_be_less_than_the_window(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap_frames {overlap}: expected 0 to window_frames - 1 = 3"):
        generate(make_model(), [], window_frames=4, overlap_frames=overlap)


def test_progress_and_empty_story() -> None:
    seen: list[tuple[int, int]] = []
    model = make_model()
    generate(model, scripts_only(make_frames(2)), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert generate(model, []).shape == (0, 2, 3)


def test_generated_tokens_carry_the_frame_before() -> None:
    """With a sure last component, no noise and an empty head, the last frame of the history is repeated."""
    model = make_model(replace(CONFIG, carry_previous=True), trained=False)
    with torch.no_grad():
        model.head.bias.zero_()[3] = 100.0
    history = make_frames(2)
    made = generate(model, scripts_only(make_frames(3)), history=history, temperature=0.0)
    np.testing.assert_allclose(made, np.repeat(history[-1].tokens[None], 3, 0), atol=1e-3)
