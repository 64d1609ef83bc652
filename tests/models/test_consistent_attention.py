import itertools

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st

from models.consistent_attention import (
    Consistency,
    ConsistentSelfAttention,
    Window,
    _sample_window,
    paint_consistently,
    plan_windows,
)
from models.diffusers_pipelines import Sampling, decode
from models.picture_folder import PictureFolder
from models.sdxl_pictures import load_sdxl, sample_latents
from tests.tiny_pipelines import write_sdxl_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = Sampling(steps=2, guidance=3.0, width_px=32, height_px=32, seed=0)
PROMPTS = ["a red dog", "the sea", "night"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return load_sdxl(write_sdxl_pipeline(tmp_path_factory.mktemp("weights") / "sdxl"), "float32")


def paint(sdxl, folder, prompts=PROMPTS, **consistency) -> list[bytes]:
    pictures = PictureFolder(folder, 95)
    paint_consistently(sdxl, prompts, SAMPLING, Consistency(**consistency), pictures, lambda *_: None)
    return [pictures.read(frame) for frame in range(len(prompts))]


def plain(sdxl, folder, frames) -> list[bytes]:
    """Pictures of plain SDXL, some frames in one batch."""
    pictures = PictureFolder(folder, 95)
    latents = sample_latents(sdxl, [PROMPTS[f] for f in frames], frames, SAMPLING, lambda _, latents: latents)
    for frame, own in zip(frames, latents, strict=True):
        pictures.keep(frame, decode(sdxl, own))
    return [pictures.read(frame) for frame in frames]


def test_nothing_drawn_from_the_others_is_plain_sdxl(sdxl, tmp_path):
    expected = plain(sdxl, tmp_path / "plain", [0, 1, 2])
    assert paint(sdxl, tmp_path / "a", sampling_rate=0.0) == expected
    assert paint(sdxl, tmp_path / "b", sampling_rate=0.5) != expected
    assert plain(sdxl, tmp_path / "again", [0, 1, 2]) == expected, "the pipeline's own attention came back"


def test_one_picture_is_plain_sdxl(sdxl, tmp_path):
    assert paint(sdxl, tmp_path / "a", PROMPTS[:1], sampling_rate=1.0) == plain(sdxl, tmp_path / "plain", [0])


def test_another_pictures_prompt_changes_this_picture(sdxl, tmp_path):
    first = paint(sdxl, tmp_path / "a")[0]
    assert paint(sdxl, tmp_path / "b", ["a red dog", "the sun", "night"])[0] != first
    assert paint(sdxl, tmp_path / "c", [*PROMPTS[:2], "day"])[0] != first


def test_pictures_that_windows_share_are_painted_once_and_looked_at(sdxl, tmp_path):
    split = {"window_pictures": 2, "overlap_pictures": 1}
    rows = paint(sdxl, tmp_path / "a", **split)
    assert paint(sdxl, tmp_path / "first", PROMPTS[:2], **split) == rows[:2], "the first window knows no later one"
    assert paint(sdxl, tmp_path / "b", ["a red dog", "the sun", "night"], **split)[2] != rows[2]


def test_shared_pictures_pass_through_each_step_as_they_were(sdxl):
    def sample(known):
        return _sample_window(sdxl, PROMPTS, Window(1, 3, 1), known, SAMPLING, 0.5, lambda step: None)

    known = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    path = sample(known)
    assert torch.equal(path[:, :1], known)
    assert not torch.equal(path[-1, 1], sample(2 * known)[-1, 1]), "the new picture looks at them"


def make_layer(width: int = 8) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=width, heads=2, dim_head=width // 2).eval()


@torch.no_grad()
def test_all_tokens_of_the_others_are_attention_over_the_whole_batch():
    layer, tokens = make_layer(), torch.randn(2 * 3, 5, 8)
    consistent = ConsistentSelfAttention(3, 1.0, torch.Generator().manual_seed(0))(layer, tokens)
    joined = tokens.unflatten(0, (2, 3)).flatten(1, 2).repeat_interleave(3, dim=0)
    torch.testing.assert_close(consistent, AttnProcessor2_0()(layer, tokens, joined))


@settings(deadline=None, max_examples=30)
@given(pictures=st.integers(1, 5), tokens=st.integers(1, 6), rate=st.floats(0, 1), halves=st.integers(1, 2))
def test_own_tokens_come_first_and_others_once_from_the_same_half(pictures, tokens, rate, halves):
    numbers = torch.arange(halves * pictures * tokens, dtype=torch.float32).view(halves * pictures, tokens, 1)
    attention = ConsistentSelfAttention(pictures, rate, torch.Generator().manual_seed(0))
    paired = attention.pair(numbers)
    assert paired.shape[1] == tokens + round(rate * (pictures - 1) * tokens)
    for index, own in enumerate(paired[..., 0].tolist()):
        assert own[:tokens] == numbers[index, :, 0].tolist()
        half = index // pictures * pictures
        others = set(numbers[half : half + pictures].flatten().tolist()) - set(own[:tokens])
        assert set(own[tokens:]) <= others
        assert len(set(own)) == len(own)


@given(frames=st.integers(1, 60), window=st.integers(2, 12), data=st.data())
def test_each_frame_is_new_in_one_window_and_windows_share_frames(frames, window, data):
    overlap = data.draw(st.integers(1, window - 1))
    windows = plan_windows(frames, Consistency(0.5, window, overlap))
    new = [frame for w in windows for frame in range(w.start + w.known, w.end)]
    assert new == list(range(frames))
    assert all(w.end - w.start <= window for w in windows)
    for before, after in itertools.pairwise(windows):
        assert after.start + after.known == before.end
        assert after.known == overlap <= before.end - before.start
