import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_safe.diffusion.noise import NoiseSchedule, TimestepBias


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def predicting(scheduler, kind):
    return DDIMScheduler.from_config(scheduler.config, prediction_type=kind)


@pytest.fixture
def scheduler():
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_noise_is_added_as_the_schedule_says(scheduler):
    noisy = NoiseSchedule(scheduler).add(LATENTS, generators(3))
    kept = scheduler.alphas_cumprod[noisy.timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy.model_input, kept.sqrt() * LATENTS + (1 - kept).sqrt() * noisy.target)
    assert abs(noisy.target.std().item() - 1) < 0.1


def test_velocity_is_the_target_of_models_that_predict_it(scheduler):
    noise = NoiseSchedule(scheduler).add(LATENTS, generators(3))
    velocity = NoiseSchedule(predicting(scheduler, "v_prediction")).add(LATENTS, generators(3))
    kept = scheduler.alphas_cumprod[noise.timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(velocity.target, kept.sqrt() * noise.target - (1 - kept).sqrt() * LATENTS)
    assert torch.equal(velocity.model_input, noise.model_input)


def test_a_sample_depends_on_its_generator_only(scheduler):
    schedule = NoiseSchedule(scheduler)
    together = schedule.add(LATENTS, generators(3))
    alone = schedule.add(LATENTS[2:], generators(1, first=2))
    torch.testing.assert_close(together.model_input[2:], alone.model_input)
    assert together.timesteps[2] == alone.timesteps[0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights(scheduler, kind):
    timesteps = torch.tensor([1, 300, 900])
    kept = scheduler.alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    divided = snr if kind == "epsilon" else snr + 1
    weights = NoiseSchedule(predicting(scheduler, kind), snr_gamma=5.0).snr_weights(timesteps)
    torch.testing.assert_close(weights, torch.minimum(snr, torch.tensor(5.0)) / divided)
    assert NoiseSchedule(scheduler).snr_weights(timesteps).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("bias", "favoured"),
    [
        (TimestepBias("later", 3.0), slice(750, None)),
        (TimestepBias("earlier", 3.0), slice(0, 250)),
    ],
)
def test_timesteps_are_drawn_as_often_as_the_bias_says(scheduler, bias, favoured):
    assert TimestepBias().weights(1000).unique().numel() == 1
    weights = bias.weights(1000)
    assert weights.sum().item() == pytest.approx(1) and weights[favoured].sum().item() == pytest.approx(0.5)
    drawn = NoiseSchedule(scheduler, bias=bias).add(torch.zeros(400, 1, 1, 1), generators(400)).timesteps
    inside = torch.zeros(1000, dtype=torch.bool)
    inside[favoured] = True
    assert 0.42 < inside[drawn].float().mean() < 0.58


def test_what_cannot_be_predicted_is_refused(scheduler):
    with pytest.raises(ValueError, match="prediction_type 'sample': allowed are epsilon, v_prediction"):
        NoiseSchedule(DDIMScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match="timestep_bias_multiplier 0.0: leaves no timestep"):
        TimestepBias("later", 0.0, portion=1.0).weights(1000)
