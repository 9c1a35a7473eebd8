"""Predictions of the student, the EMA and the frozen model for prompts given as text."""

from contextlib import nullcontext

import torch
from torch import nn

from ..diffusion.trajectories import select
from ..families import Conditioning, ModelFamily
from ..weights.trained import TrainedWeights


class Predictor:
    """`predictor(model_input, timesteps, prompts, weights)` for prompts that were encoded once, at the start.

    Args:
        family (`ModelFamily`): The model family; its text encoder is not needed any more after this.
        weights (`TrainedWeights`): Of the family's denoiser.
        prompts (`list[str]`): Every prompt that will ever be asked for; `""` is added.
        device (`torch.device`): Where the denoiser computes.
        student (`nn.Module`, *optional*): The denoiser as it is trained, possibly wrapped for several processes.

    Attributes:
        forwards (`int`): How many samples the denoiser has seen so far.
    """

    def __init__(
        self,
        family: ModelFamily,
        weights: TrainedWeights,
        prompts: list[str],
        device: torch.device | str = "cpu",
        student: nn.Module | None = None,
    ):
        self.family, self.weights, self.device = family, weights, device
        self.student = family.denoiser if student is None else student
        self.forwards = 0
        texts = list(dict.fromkeys(["", *prompts]))
        self._rows = {text: row for row, text in enumerate(texts)}
        # Trained weights are float32, whatever the text encoder is.
        self._encoded = {name: value.float() for name, value in family.encode(texts, device).items()}

    def conditioning(self, prompts: list[str]) -> Conditioning:
        """The encoded prompts, batch size `len(prompts)`."""
        return select(self._encoded, [self._rows[prompt] for prompt in prompts])

    def __call__(
        self, model_input: torch.Tensor, timesteps: torch.Tensor, prompts: list[str], weights: str
    ) -> torch.Tensor:
        """One forward pass, `(B, C, H, W)`; gradients flow only if `weights` is `"student"` and they are enabled."""
        return self.predict(model_input, timesteps, self.conditioning(prompts), weights)

    def predict(
        self, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, weights: str
    ) -> torch.Tensor:
        self.forwards += len(model_input)
        learns = weights == "student" and torch.is_grad_enabled()
        denoiser = self.student if learns else self.family.denoiser
        with self.weights.use(weights), nullcontext() if learns else torch.no_grad():
            return self.family.predict(denoiser, model_input, timesteps, conditioning).float()
