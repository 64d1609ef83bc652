import pytest
import torch
from diffusers import DDIMScheduler

from models.diffusion import NoiseSchedule
from models.samplers import SamplerError, fitting_schedulers

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = 0.7, 0.5  # of the data, which is Gaussian: what a perfect model predicts is known in closed form
PREDICTIONS = ("epsilon", "v_prediction")
EVERY = [(p, name) for p in PREDICTIONS for name in fitting_schedulers(NoiseSchedule(1000, p).training)]


def perfect_denoiser(schedule: NoiseSchedule):
    """Expected noise or velocity given a noisy sample; asserts that it is asked as the decoder is."""

    def predict(noisy, timesteps):
        assert timesteps.dtype == torch.long and timesteps.shape == (len(noisy),)
        squared = schedule.training.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, noise = squared.sqrt(), (1 - squared).sqrt()
        error = noisy - signal * MEAN
        variance = squared * STD**2 + 1 - squared
        epsilon, clean = noise * error / variance, MEAN + signal * STD**2 * error / variance
        return epsilon if schedule.prediction == "epsilon" else signal * epsilon - noise * clean

    return predict


def draw(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("prediction", "name"), EVERY)
def test_samples_of_a_perfect_model_have_the_datas_mean_and_spread(prediction, name):
    schedule = NoiseSchedule(1000, prediction)
    few, many = (schedule.sample(perfect_denoiser(schedule), draw(500), steps, name) for steps in (10, 100))
    # Where the last timestep is not pure noise, starting from pure noise leaves the mean off by 0.03.
    assert many.mean().item() == pytest.approx(MEAN, abs=0.035 if prediction == "epsilon" else 0.01)
    assert many.std().item() == pytest.approx(STD, abs=0.035)
    assert abs(many.std() - STD) < abs(few.std() - STD) / 2, "more steps bring it no nearer"


def test_by_default_the_bytes_are_those_of_plain_ddim():
    schedule = NoiseSchedule(1000, "v_prediction")
    plain = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    plain.set_timesteps(7)
    latents, predict = draw(3), perfect_denoiser(schedule)
    for step in plain.timesteps:
        latents = plain.step(predict(latents, step.expand(3)), step, latents).prev_sample
    assert torch.equal(schedule.sample(predict, draw(3), 7), latents)


@pytest.mark.parametrize(("prediction", "name"), EVERY)
def test_a_sample_does_not_depend_on_the_batch_it_is_in(prediction, name):
    schedule = NoiseSchedule(1000, prediction)
    predict = perfect_denoiser(schedule)
    together = schedule.sample(predict, draw(3), 4, name, seeds=[7, 8, 9])
    alone = schedule.sample(predict, draw(3)[2:], 4, name, seeds=[9])
    assert torch.allclose(together[2:], alone, atol=1e-6)
    other = schedule.sample(predict, draw(3), 4, name, seeds=[7, 8, 10])
    assert torch.equal(together[:2], other[:2])
    draws = "Ancestral" in name or name == "DDPMScheduler"
    assert torch.equal(together[2], other[2]) != draws


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_steps_are_taken_in_the_precision_of_the_noise(name):
    schedule = NoiseSchedule(1000, "v_prediction")
    predict, seen = perfect_denoiser(schedule), set()

    def halved(noisy, timesteps):
        seen.add(noisy.dtype)
        return predict(noisy, timesteps).bfloat16()

    samples = schedule.sample(halved, draw(500), 50, name)
    assert seen == {torch.float32} and samples.dtype == torch.float32
    assert torch.allclose(samples, schedule.sample(predict, draw(500), 50, name), atol=0.05)


@pytest.mark.parametrize("name", ["NoScheduler", "DDIMInverseScheduler", "EDMEulerScheduler", "UNet2DModel", ""])
def test_a_name_that_is_no_fitting_scheduler_is_refused_with_those_that_are(name):
    with pytest.raises(SamplerError, match=rf"scheduler '{name}' is no scheduler.*DDIMScheduler.*PNDMScheduler"):
        NoiseSchedule(1000, "epsilon").sample(lambda z, t: z, draw(1), 2, name)


def test_a_scheduler_that_cannot_start_from_pure_noise_is_refused_with_those_that_can():
    schedule = NoiseSchedule(1000, "v_prediction")
    with pytest.raises(SamplerError, match="'HeunDiscreteScheduler' cannot start from pure noise, as this") as error:
        schedule.sample(lambda z, t: z, draw(1), 2, "HeunDiscreteScheduler")
    offered = str(error.value).partition("expected one of ")[2].split(", ")
    assert offered == list(fitting_schedulers(schedule.training)) and "HeunDiscreteScheduler" not in offered
    for name in offered:
        schedule.sample(lambda z, t: z, draw(1), 2, name)


def test_a_number_of_steps_that_a_scheduler_cannot_take_is_refused():
    schedule = NoiseSchedule(1000, "epsilon")
    with pytest.raises(SamplerError, match=r"DDIMScheduler cannot take 1001 steps .*at most 1000"):
        schedule.sample(perfect_denoiser(schedule), torch.zeros(1, 1, 2, 2), 1001, "DDIMScheduler")
