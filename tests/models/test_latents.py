import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.latents import BlockCosineTransform, cover, crop_randomly, read_picture, to_tensor, write_jpeg


def _pictures(count: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0.1, 0.9)


@settings(max_examples=10, deadline=None)
@given(block=st.sampled_from([4, 8, 16]), flattening=st.floats(0, 1))
def test_all_coefficients_give_the_picture_back(block, flattening):
    pictures = _pictures()
    latents = BlockCosineTransform(block, block**2, block**2, flattening)
    latents.fit(latents.transform(pictures))
    assert torch.allclose(latents.decode(latents.encode(pictures)), pictures, atol=1e-4)


def test_shape_and_scale_of_the_latents():
    latents = BlockCosineTransform(8, 28, 10, 1.0)
    latents.fit(latents.transform(_pictures(8)))
    encoded = latents.encode(_pictures(8))
    assert encoded.shape == (8, 48, 4, 6)
    assert latents.channels == 48
    assert encoded[:, 0].std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("flattening", [0.0, 0.5])
def test_latents_have_unit_power_at_any_flattening(flattening):
    latents = BlockCosineTransform(8, 28, 10, flattening)
    latents.fit(latents.transform(_pictures(8)))
    assert latents.encode(_pictures(8)).square().mean() == pytest.approx(1, abs=0.05)


def test_a_grey_picture_is_all_in_the_first_coefficient():
    latents = BlockCosineTransform(8, 4, 1, 0.5)
    encoded = latents.encode(torch.full((1, 3, 8, 8), 0.75))
    assert encoded[0, 0].item() == pytest.approx(0.25 * 8, abs=1e-4)  # orthonormal: mean times the side
    assert encoded[0, 1:].abs().max() < 1e-4


def test_decoding_dropped_coefficients_loses_only_their_energy():
    pictures = _pictures()
    latents = BlockCosineTransform(8, 28, 10, 0.5)
    once = latents.decode(latents.encode(pictures))
    assert (once - pictures).square().mean() < 1e-3
    assert torch.allclose(latents.decode(latents.encode(once)), once, atol=1e-4)


def test_sides_that_are_no_multiple_of_the_block_are_refused():
    with pytest.raises(ValueError, match="20x16"):
        BlockCosineTransform(8, 4, 1, 0.5).encode(torch.rand(1, 3, 16, 20))


@pytest.mark.parametrize("count", [0, 65])
def test_an_impossible_number_of_coefficients_is_refused(count):
    with pytest.raises(ValueError, match=f"luma coefficients are {count}"):
        BlockCosineTransform(8, count, 1, 0.5)


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 90), st.integers(5, 90))
def test_cover_gives_the_size_and_keeps_a_flat_picture_flat(height, width):
    covered = cover(torch.full((1, 3, height, width), 0.5), 16, 32)
    assert covered.shape == (1, 3, 16, 32)
    assert torch.allclose(covered, torch.tensor(0.5), atol=1e-5)


def test_cover_crops_around_the_middle():
    picture = torch.zeros(1, 3, 16, 64)
    picture[..., :16] = picture[..., -16:] = 1.0
    assert cover(picture, 16, 32).abs().max() < 1e-5


def test_cover_commutes_with_mirroring():
    picture = torch.rand(1, 3, 18, 40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cover(picture.flip(3), 16, 24), cover(picture, 16, 24).flip(3), atol=1e-5)


def test_random_crops_follow_the_generator():
    picture = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    first, again = (crop_randomly(picture, 16, 16, np.random.default_rng(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, 16, 16)
    assert not torch.equal(first, crop_randomly(picture, 16, 16, np.random.default_rng(2)))


def test_jpeg_goes_both_ways():
    picture = _pictures(1)[0]
    assert (read_picture(write_jpeg(picture)) - picture).abs().mean() < 0.02


def test_a_grey_jpeg_is_read_as_rgb():
    buffer = io.BytesIO()
    Image.new("L", (10, 6), 128).save(buffer, "JPEG")
    assert read_picture(buffer.getvalue()).shape == (3, 6, 10)


def test_to_tensor_scales_to_one():
    assert to_tensor(np.full((1, 2, 2, 3), 255, np.uint8)).max() == 1.0
