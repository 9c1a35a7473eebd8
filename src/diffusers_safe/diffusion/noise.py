"""Noise for training on images: the noise level of each image, the prediction target, and the weight of an error."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr


TARGETS = ("epsilon", "v_prediction")  # of diffusion
FLOW = "flow"  # of flow matching: the velocity, noise minus latents
TIMESTEP_BIASES = ("none", "earlier", "later")


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What a model with this scheduler predicts: `"epsilon"`, `"v_prediction"`, `"sample"` or `"flow"`."""
    if type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas"):
        return FLOW
    return scheduler.config.get("prediction_type", "epsilon")


@dataclass
class NoisyLatents:
    """Attributes:
    model_input (`torch.Tensor`): `(B, C, H, W)`, the latents with noise.
    timesteps (`torch.Tensor`): `(B,)`; integers, but for flow matching.
    target (`torch.Tensor`): `(B, C, H, W)`, what the model should predict: the noise, or a velocity.
    """

    model_input: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor


@dataclass
class TimestepBias:
    """Which timesteps are sampled more often; the strategies of diffusers' `train_text_to_image_sdxl.py`.

    Attributes:
        strategy (`str`): `"none"`: all alike; `"earlier"` or `"later"`: the first or last `portion` of them.
        multiplier (`float`): How many times as often, at least 0.
        portion (`float`): In (0, 1).
    """

    strategy: str = "none"
    multiplier: float = 1.0
    portion: float = 0.25

    def weights(self, num_timesteps: int) -> torch.Tensor:
        """The probability of each timestep, `(num_timesteps,)`, summing to 1.

        Raises:
            `ValueError`: If no timestep is left.
        """
        weights = torch.ones(num_timesteps, dtype=torch.float64)
        count = int(self.portion * num_timesteps)
        favoured = {
            "none": slice(0, 0),
            "earlier": slice(0, count),
            "later": slice(num_timesteps - count, None),
        }[self.strategy]
        weights[favoured] *= self.multiplier
        if not weights.sum() > 0:
            raise ValueError(f"timestep_bias_multiplier {self.multiplier}: leaves no timestep to train")
        return weights / weights.sum()


class Diffusion:
    """Latents with noise as `sqrt(a) x + sqrt(1 - a) n`, a being the scheduler's `alphas_cumprod`.

    Args:
        scheduler (`SchedulerMixin`): Its betas and `prediction_type` are used.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.predicts_velocity = self.scheduler.config.prediction_type == "v_prediction"
        self.timesteps = torch.arange(self.scheduler.config.num_train_timesteps)

    def add(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.get_velocity(latents, noise, timesteps) if self.predicts_velocity else noise

    def min_snr(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Min-SNR (Hang et al., arXiv 2303.09556) for what the model predicts."""
        snr = compute_snr(self.scheduler, timesteps).float()
        return snr.clamp(max=gamma) / (snr + 1 if self.predicts_velocity else snr)


class FlowMatching:
    """Latents with noise as `(1 - s) x + s n`, and the velocity `n - x` as target (Lipman et al., arXiv 2210.02747).

    Args:
        scheduler (`SchedulerMixin`): Its timesteps, `s` times their number, as they are before `set_timesteps`.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler = type(scheduler).from_config(scheduler.config)
        self.timesteps = self.scheduler.timesteps.flip(0)  # from little noise to much, as diffusion counts them

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps / self.scheduler.config.num_train_timesteps

    def add(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigmas = self._sigmas(timesteps).view(-1, 1, 1, 1).to(latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def min_snr(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Min-SNR: the error of the latents, `s` times the velocity's, counts `min(SNR, gamma)` times."""
        sigmas = self._sigmas(timesteps).float()
        return ((1 - sigmas) / sigmas).square().clamp(max=gamma) * sigmas.square()


class NoiseSchedule:
    """Adds noise to latents as the model's own scheduler counts it.

    Args:
        scheduler (`SchedulerMixin`): Of the model: [`Diffusion`] whose `prediction_type` is one of `TARGETS`, or
            [`FlowMatching`].
        snr_gamma (`float`, *optional*): Errors count min(SNR, gamma) / SNR times, as in Min-SNR (Hang et al., arXiv
            2303.09556).
        bias (`TimestepBias`, *optional*): Which timesteps come more often.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        snr_gamma: float | None = None,
        bias: TimestepBias | None = None,
    ):
        self.prediction_type = prediction_type(scheduler)
        if self.prediction_type not in (*TARGETS, FLOW):
            raise ValueError(f"prediction_type '{self.prediction_type}': allowed are {', '.join(TARGETS)}")
        self.snr_gamma = snr_gamma
        self._process = (FlowMatching if self.prediction_type == FLOW else Diffusion)(scheduler)
        self._often = (bias or TimestepBias()).weights(len(self._process.timesteps))

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler by which noise is added."""
        return self._process.scheduler

    def add(self, latents: torch.Tensor, generators: list[torch.Generator]) -> NoisyLatents:
        """Noise for `(B, C, H, W)` latents, sampled from B generators on the CPU."""
        places = torch.cat([torch.multinomial(self._often, 1, generator=generator) for generator in generators])
        noise = self._randn(latents, generators)
        timesteps = self._process.timesteps[places].to(latents.device)
        model_input = self._process.add(latents, noise, timesteps)
        return NoisyLatents(model_input, timesteps, self._process.target(latents, noise, timesteps))

    def _randn(self, like: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(noise).to(like.device)

    def snr_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """How much the errors at `(B,)` timesteps count, `(B,)`; 1 without `snr_gamma`."""
        if self.snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        return self._process.min_snr(timesteps, self.snr_gamma)
