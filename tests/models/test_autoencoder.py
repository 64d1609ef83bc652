import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.autoencoder import (
    Architecture,
    Autoencoder,
    Compressor,
    draw_noise,
    load_autoencoder,
    save_autoencoder,
)
from models.diffusion import NoiseSchedule, add_token_noise
from models.feature_table import FeatureSpace
from models.loader import draw_batch
from models.reconstructions import choose_films, measure_reconstructions
from models.renderer import Renderer, load_renderer, save_renderer
from models.sdxl_decoder import SdxlDecoder, load_unet
from models.small_decoder import Draft, SmallDecoder
from models.weights import WeightsError
from tests.tiny_checkpoints import save_sdxl

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = FeatureSpace(
    image_encoder="dinov2_small",
    encoder_height_px=28,
    encoder_width_px=56,
    patches=8,
    feature_dim=384,
    vae=None,
    block_px=8,
    luma=6,
    chroma=3,
    latent_channels=12,
    height_px=16,
    width_px=32,
    crop_px=16,
)
TINY = Architecture(
    space=SPACE,
    tokens=2,
    token_dim=8,
    compressor_width=16,
    compressor_heads=2,
    pretrained=None,
    flattening=0.5,
    channels=(16, 16),
    layers=1,
    cross_dim=16,
    heads=2,
    norm_groups=4,
    draft_components=3,
    draft_width=16,
    timesteps=100,
    prediction="v_prediction",
)


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(TINY).eval()
    torch.nn.init.normal_(model.decoder.unet.conv_out.weight)  # it starts at zero: the UNet would be seen in nothing
    return model


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0))


def test_tokens_have_zero_mean_and_unit_variance(model, pictures):
    tokens = model.encode(pictures)
    assert tokens.shape == (3, 2, 8)
    assert torch.allclose(tokens.mean(dim=-1), torch.zeros(3, 2), atol=1e-5)
    assert torch.allclose(tokens.var(dim=-1, unbiased=False), torch.ones(3, 2), atol=1e-3)


def test_a_picture_has_the_same_tokens_alone_and_in_a_batch(model, pictures):
    assert torch.allclose(model.encode(pictures)[1:2], model.encode(pictures[1:2]), atol=1e-4)


def test_decode_gives_pictures_that_follow_the_seed(model, pictures):
    tokens = model.encode(pictures)
    first, again, other = (model.decode(tokens, steps=3, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (3, 3, 16, 32)
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_picture_decodes_alike_in_batches_of_any_size(model, pictures):
    tokens = model.encode(pictures)
    together, apart = (model.decode(tokens, steps=2, seed=0, batch=batch) for batch in (3, 1))
    assert torch.allclose(together, apart, atol=1e-4)


def test_the_starting_noise_of_a_picture_depends_on_its_place_only(model):
    assert torch.equal(draw_noise(model, 5, seed=3)[:2], draw_noise(model, 2, seed=3))


def test_the_decoder_takes_latents_of_another_size(model, pictures):
    tokens = model.encode(pictures)
    noisy = torch.randn(3, model.latents.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    assert model.decoder(noisy, torch.tensor([1, 2, 3]), tokens).shape == noisy.shape


def test_a_saved_autoencoder_answers_as_before(model, pictures, tmp_path):
    save_autoencoder(model, tmp_path)
    loaded = load_autoencoder(sorted(tmp_path.iterdir()))
    assert torch.equal(loaded.encode(pictures), model.encode(pictures))
    assert json.loads((tmp_path / "config.json").read_text())["token_dim"] == 8


def test_an_artifact_without_its_config_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_autoencoder([tmp_path / "model.safetensors"])


def test_retrieval_is_perfect_for_the_keyframes_themselves(model):
    pictures = torch.rand(4, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    films, trained = ["a", "a", "b", "b"], [True, True, True, False]
    measured = measure_reconstructions(model, films, trained, pictures, pictures * 0.99)
    assert measured["retrieval_top1_by_film"] == {"a": 1.0, "b": 1.0}
    exchanged = measure_reconstructions(model, films, trained, pictures, pictures[[1, 0, 3, 2]])
    assert exchanged["retrieval_top1"] == 0.0


def test_retrieval_counts_heldout_keyframes_apart(model):
    pictures = torch.rand(3, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    measured = measure_reconstructions(model, ["a"] * 3, [True, True, False], pictures, pictures[[0, 1, 1]])
    assert (measured["retrieval_top1_train"], measured["retrieval_top1_heldout"]) == (1.0, 0.0)
    assert measured["keyframes_heldout"] == 1
    whole = measure_reconstructions(model, ["a"] * 3, [True] * 3, pictures, pictures)
    assert whole["retrieval_top1_heldout"] is None


def test_a_collapsed_model_retrieves_nothing(model):
    same = torch.full((3, 3, 16, 32), 0.5)
    assert measure_reconstructions(model, ["a"] * 3, [True] * 3, same, same)["retrieval_top1"] == 0.0


def test_draft_components_span_the_training_latents():
    latents = torch.randn(4, 12, 2, 4, generator=torch.Generator().manual_seed(0))
    draft = Draft(TINY, (12, 2, 4))
    draft.fit(latents)
    flat = draft.components.flatten(1)
    rest = (latents - draft.mean).flatten(1)
    weights = torch.linalg.lstsq(flat.T, rest.T).solution
    assert torch.allclose(flat.T @ weights, rest.T, atol=1e-4)
    assert torch.allclose(weights.square().mean(dim=1), torch.ones(3), atol=1e-3)  # scaled to standard deviations


def test_more_components_than_pictures_stay_zero():
    draft = Draft(TINY, (12, 2, 4))
    draft.fit(torch.randn(2, 12, 2, 4, generator=torch.Generator().manual_seed(0)))
    assert draft.components[2].abs().max() == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_drafts_alone_denoise_latents_that_are_gaussian_around_them(prediction):
    generator = torch.Generator().manual_seed(0)
    decoder = SmallDecoder(replace(TINY, prediction=prediction), NoiseSchedule(100, prediction))
    decoder.draft.spread.data.fill_(math.log(0.25) / 4)  # a variance of 1/4
    decoder.draft.mean.copy_(torch.randn(12, 2, 4, generator=generator))
    tokens = torch.randn(500, 2, 8, generator=generator)
    latents = decoder.draft.mean + 0.5 * torch.randn(500, 12, 2, 4, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    for step in (5, 50, 90):
        signal = decoder.signal[step]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        with torch.no_grad():
            found = decoder(noisy, torch.full((500,), step), tokens)
        if prediction == "epsilon":
            found = (found - (1 - signal).sqrt() * noisy) / signal.sqrt()  # to a velocity
        # The clean latent that follows from it is the posterior mean: its error is the posterior variance.
        clean = signal.sqrt() * noisy - (1 - signal).sqrt() * found
        posterior = 1 / (1 / 0.25 + signal / (1 - signal))
        assert (clean - latents).square().mean() == pytest.approx(posterior.item(), rel=0.03)


def test_fitted_features_have_unit_scale():
    compressor = Compressor(replace(TINY, space=replace(SPACE, feature_dim=6)))
    features = 100 + 7 * torch.randn(50, 8, 6, generator=torch.Generator().manual_seed(0))
    compressor.fit(features)
    scaled = (features - compressor.feature_mean) / compressor.feature_std
    assert scaled.mean().abs() < 1e-4
    assert scaled.std() == pytest.approx(1, abs=0.02)


def test_sdxls_decoder_hears_tokens_sentences_and_their_order(tmp_path):
    folder = save_sdxl(tmp_path)
    torch.manual_seed(0)
    decoder = SdxlDecoder(TINY, load_unet(folder)).eval()
    noisy, tokens = torch.randn(2, 4, 4, 8), torch.randn(2, 2, 8)
    steps = torch.tensor([10, 500])

    def denoise(tokens, extra=None):
        with torch.no_grad():
            return decoder(noisy, steps, tokens, extra)

    plain = denoise(tokens)
    assert plain.shape == noisy.shape
    assert torch.equal(plain, denoise(tokens))
    assert not torch.allclose(plain, denoise(tokens.flip(1)))  # the pooled input is a map of all tokens in order
    assert not torch.allclose(plain, denoise(tokens, torch.randn(2, 3, decoder.cross_dim)))


def test_weights_that_a_file_lacks_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_sdxl(tmp_path) / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({name: value for name, value in load_file(path).items() if not name.startswith("conv_in")}, path)
    with pytest.raises(WeightsError, match="lacks 2 weights, such as conv_in.bias: get it again"):
        load_unet(tmp_path)


def test_measured_keyframes_are_those_of_whole_films():
    films = ["a"] * 5 + ["b"] * 5 + ["c"] * 5
    assert choose_films(films, 100) == list(range(15))
    chosen = choose_films(films, 12)
    assert len(chosen) == 12
    assert sorted(map([films[row] for row in chosen].count, "abc")) == [2, 5, 5]


def test_a_unet_without_pooled_text_is_refused(tmp_path):
    from diffusers import UNet2DConditionModel

    plain = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected SDXL's text_time"):
        SdxlDecoder(TINY, plain)


@pytest.fixture
def renderer(model) -> Renderer:
    torch.manual_seed(1)
    return Renderer(model, text_dim=5, face_dim=4, max_sentences=3, max_faces=2).eval()


def _denoise(renderer: Renderer, **changes):
    generator = torch.Generator().manual_seed(0)
    given = {
        "noisy": torch.randn(2, renderer.autoencoder.latents.channels, 2, 4, generator=generator),
        "timesteps": torch.tensor([50, 60]),
        "tokens": torch.randn(2, 2, 8, generator=generator),
        "sentences": torch.randn(2, 3, 5, generator=generator),
        "faces": torch.randn(2, 2, 4, generator=generator),
    }
    with torch.no_grad():
        return renderer(**given | changes)


def test_sentences_and_faces_reach_the_picture(renderer):
    plain = _denoise(renderer)
    assert not torch.equal(plain, _denoise(renderer, sentences=torch.zeros(2, 3, 5)))
    assert not torch.equal(plain, _denoise(renderer, faces=torch.zeros(2, 2, 4)))


def test_a_masked_entry_counts_as_padding(renderer):
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[:, 2:] = False
    masked = _denoise(renderer, keep=keep)
    assert torch.equal(masked, _denoise(renderer, sentences=torch.zeros(2, 3, 5), faces=torch.zeros(2, 2, 4)))


def test_padding_cuts_and_fills(renderer):
    padded = renderer.pad_sentences([np.ones((5, 5)), np.ones((1, 5)), np.zeros((0, 5))])
    assert padded.sum(dim=(1, 2)).tolist() == [15.0, 5.0, 0.0]
    assert renderer.pad_faces([np.ones((3, 4))]).shape == (1, 2, 4)


def test_a_saved_renderer_answers_as_before(renderer, model, tmp_path):
    save_renderer(renderer, tmp_path)
    loaded = load_renderer(sorted(tmp_path.iterdir()), model)
    assert torch.equal(_denoise(loaded), _denoise(renderer))


def test_a_renderer_of_another_autoencoder_is_refused(renderer, tmp_path):
    save_renderer(renderer, tmp_path)
    other = Autoencoder(replace(TINY, cross_dim=8))
    with pytest.raises(ValueError, match="does not fit its autoencoder"):
        load_renderer(sorted(tmp_path.iterdir()), other)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_with_a_perfect_denoiser_gives_the_latents_back(prediction):
    schedule = NoiseSchedule(1000, prediction)
    truth = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))

    def denoise(noisy, timesteps):
        alpha = schedule.training.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        noise = (noisy - alpha * truth) / sigma
        return noise if prediction == "epsilon" else alpha * noise - sigma * truth

    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(schedule.sample(denoise, noise, steps=20), truth, atol=1e-2)


def test_the_last_timestep_is_pure_noise_with_v_prediction():
    assert NoiseSchedule(1000, "v_prediction").training.alphas_cumprod[-1] < 1e-12
    assert NoiseSchedule(1000, "epsilon").training.alphas_cumprod[-1] > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_mean_square_of_what_is_to_be_predicted(prediction):
    schedule = NoiseSchedule(1000, prediction)
    latents = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = schedule.loss(lambda z, t: torch.zeros_like(z), latents, 0.05, torch.Generator().manual_seed(1))
    assert loss == pytest.approx(1.0, abs=0.05)


def test_token_noise_lies_between_none_and_the_largest():
    noisy = add_token_noise(torch.zeros(50, 2, 500), 0.4, torch.Generator().manual_seed(0))
    scales = noisy.std(dim=(1, 2))
    assert scales.min() < 0.1
    assert 0.3 < scales.max() < 0.45
    assert torch.equal(add_token_noise(torch.ones(1, 2, 3), 0.0, torch.Generator()), torch.ones(1, 2, 3))


def test_each_sample_comes_once_before_any_comes_again():
    drawn = torch.cat([draw_batch(7, 3, step, seed=1) for step in range(7)])
    for epoch in drawn.split(7):
        assert sorted(epoch.tolist()) == list(range(7))
