import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_safe.diffusion.loss_weighting import LossWeighting


def scheduler(prediction_type):
    return DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)


def velocity(scheduler, noise_pred, latents, timesteps):
    """From epsilon by way of the clean sample, as diffusers converts."""
    alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    sample = (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
    return scheduler.get_velocity(sample, noise_pred, timesteps)


def error(first, second):
    return (first - second).square().flatten(1).mean(dim=1)


def test_errors_of_epsilon_become_errors_of_velocity():
    first, second, latents = torch.randn(3, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1, 250, 600, 999])
    steps = scheduler("epsilon")
    weighed = LossWeighting("velocity", steps).weigh(error(first, second), timesteps)
    expected = error(*(velocity(steps, each, latents, timesteps) for each in (first, second)))
    torch.testing.assert_close(weighed, expected, rtol=1e-3, atol=1e-5)
    assert weighed[3] / error(first, second)[3] > 100 > 1.1 > weighed[0] / error(first, second)[0]


def test_a_model_that_predicts_velocity_is_there_already():
    losses = torch.tensor([0.5])
    assert LossWeighting("velocity", scheduler("v_prediction")).weigh(losses, torch.tensor([900])) == losses
    assert LossWeighting("prediction", scheduler("epsilon")).weigh(losses, torch.tensor([900])) == losses


def test_what_cannot_be_converted_is_told():
    with pytest.raises(ValueError, match="the model predicts 'sample'; it must be epsilon or v_prediction"):
        LossWeighting("velocity", scheduler("sample"))
    with pytest.raises(ValueError, match="loss_space 'pixels': unknown; allowed are prediction, velocity"):
        LossWeighting("pixels", scheduler("epsilon"))
