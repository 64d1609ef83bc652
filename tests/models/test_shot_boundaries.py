"""Shots of clips whose cuts are known because the test made them."""

import av
import numpy as np
import pytest
import torch

from models import weights
from models.shot_boundaries import SameConv, ShotTracker, load_efficientnet, to_input

THRESHOLD = 0.7


@pytest.fixture(scope="module")
def network():
    return load_efficientnet(weights.file("efficientnet_lite0"))


@pytest.fixture(scope="module")
def clips():
    """Six pictures of each demo clip, in order; `bikes` from one of its own shots."""
    return {name: read_clip(name) for name in ("bikes", "carphone_pristine", "bigbuckbunny")}


def read_clip(name: str) -> list[np.ndarray]:
    with av.open(str(weights.folder("demo_films") / f"{name}.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for _, frame in zip(range(30), film.decode(video=0), strict=False)]
    return frames[::5]


def follow(network, pictures):
    tracker = ShotTracker(network, THRESHOLD)
    return [tracker.add(picture) for picture in pictures]


def shots(network, pictures) -> list[int]:
    return [seen.shot_index for seen in follow(network, pictures)]


def test_the_checkpoint_gives_imagenet_answers(network, clips):
    with torch.inference_mode():
        logits = network.classify(network(to_input(clips["carphone_pristine"][0])))
    assert set(logits[0].topk(3).indices.tolist()) == {457, 834, 906}  # bow tie, suit, Windsor tie


def test_padding_puts_the_odd_pixel_right_and_below():
    conv = SameConv(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(conv.weight)
    assert conv(torch.ones(1, 1, 4, 4)).tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


def test_one_shot_stays_one(network, clips):
    for pictures in clips.values():
        assert shots(network, pictures) == [0] * len(pictures)


def test_each_cut_starts_a_shot(network, clips):
    pictures = clips["bikes"][:3] + clips["carphone_pristine"][:2] + clips["bigbuckbunny"][:2] + clips["bikes"][:1]
    assert shots(network, pictures) == [0, 0, 0, 1, 1, 2, 2, 3]


def test_a_fade_through_black_is_one_boundary(network, clips):
    before, after = clips["bikes"][0], clips["carphone_pristine"][0]
    black = np.zeros_like(before)
    assert shots(network, [before, before // 2, black, black, after // 2, after]) == [0, 0, 1, 1, 1, 1]


def test_a_film_that_fades_in_begins_with_one_shot(network, clips):
    picture = clips["bikes"][0]
    assert shots(network, [picture * 0, picture // 3, picture]) == [0, 0, 0]


def test_noisy_black_is_black(network):
    noise = np.random.default_rng(0).integers(0, 9, (4, 90, 160, 3), dtype=np.uint8)
    assert shots(network, noise) == [0] * 4


def test_observations(network, clips):
    first, second, cut = follow(network, [clips["bikes"][0], clips["bikes"][1], clips["carphone_pristine"][0]])
    assert (first.similarity, first.motion) == (None, None)
    assert second.similarity > 0.9
    assert 0 < second.motion < 0.2
    assert cut.similarity < 0.5
    assert cut.motion is None
    assert all(0 < seen.luma < 1 for seen in (first, second, cut))


def test_light_is_measured_from_black_to_white(network):
    white = np.full((36, 64, 3), 255, np.uint8)
    seen = follow(network, [white * 0, white])
    assert [s.luma for s in seen] == [0.0, 1.0]
    assert seen[1].motion == 1.0


def test_threads_change_nothing(network, clips):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        several = follow(network, clips["bikes"][:3])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert several == follow(network, clips["bikes"][:3])
