"""CLIP on a tiny checkpoint, and what it says of captions beside pictures."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from models.chat_captioner import MIN_PICTURES, AlignmentError, check_fit
from models.clip import Clip
from models.weights import WeightsError
from tests.tiny_checkpoints import save_clip


def noise(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(folder):
    clip = Clip(folder, "cpu")
    pictures = [noise(seed, width=50 + seed) for seed in range(40)]
    found = clip.embed_pictures(pictures)
    assert found.shape == (40, 16) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(clip.embed_pictures(pictures[33:34]), found[33:34], atol=1e-4)
    texts = [f"text {number}" for number in range(40)] + ["x" * 500]
    words = clip.embed_texts(texts)
    assert words.shape == (41, 16)
    np.testing.assert_allclose(np.linalg.norm(words, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height"), [(60, 40), (854, 480), (720, 304), (1920, 800), (1024, 576), (304, 720), (224, 224)]
)
@pytest.mark.parametrize("side", [28, 224])
def test_pictures_are_read_as_the_library_reads_them(folder, width, height, side, monkeypatch):
    picture = noise(3, height, width)
    size = {"height": side, "width": side}
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)
    pixels = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    clip = Clip(folder, "cpu")
    monkeypatch.setattr(clip, "_side", side)
    np.testing.assert_allclose(clip._prepare(picture).transpose(2, 0, 1), pixels[0].numpy(), atol=1e-5)


def test_a_folder_without_clip_is_named(tmp_path):
    with pytest.raises(WeightsError, match="no CLIP at"):
        Clip(tmp_path)


def vectors(count: int, seed: int) -> np.ndarray:
    drawn = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1).numpy()


@pytest.mark.parametrize("count", [MIN_PICTURES, 20, 200])
def test_captions_that_fit_pass_and_shifted_ones_do_not(count):
    pictures = vectors(count, 0)
    captions = pictures + 1.5 * vectors(count, 1)
    rank = check_fit(pictures, captions)
    assert 0.7 < rank <= 1
    with pytest.raises(AlignmentError, match="fit their own pictures no better than those of others"):
        check_fit(pictures, np.roll(captions, 1, axis=0))


def test_one_long_shot_is_not_judged():
    same = np.repeat(vectors(1, 0), 20, axis=0)
    assert check_fit(same, same) is None


def test_too_few_pictures_are_not_judged():
    assert check_fit(vectors(MIN_PICTURES - 1, 0), vectors(MIN_PICTURES - 1, 1)) is None
