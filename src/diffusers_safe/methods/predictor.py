"""Predictions of the student, the EMA and the frozen model for prompts given as text."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..diffusion.trajectories import select
from ..families import Conditioning, ModelFamily, TextEncoders
from ..weights.trained import TrainedWeights


class Predictor:
    """`predictor(model_input, timesteps, prompts, weights)`.

    Prompts are encoded once, at the start; where the text encoders train, student and EMA encode them each time.

    Args:
        family (`ModelFamily`): The model family.
        weights (`TrainedWeights`): Of the family's denoiser or its text encoders.
        prompts (`list[str]`): Every prompt that will ever be asked for; `""` is added.
        device (`torch.device`): Where the denoiser computes.
        student (`nn.Module`, *optional*): What trains: the denoiser, possibly wrapped for several processes, or
            [`TextEncoders`] on the device.

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
        self.text_encoders = student if isinstance(student, TextEncoders) else None
        self.student = family.denoiser if student is None or self.text_encoders is not None else student
        self.forwards = 0
        texts = list(dict.fromkeys(["", *prompts]))
        self._rows = {text: row for row, text in enumerate(texts)}
        # Trained weights are float32, whatever the text encoder is.
        self._encoded = {name: value.float() for name, value in family.encode(texts, device).items()}

    def conditioning(self, prompts: list[str], weights: str = "frozen") -> Conditioning:
        """The encoded prompts, batch size `len(prompts)`; gradients as in a call."""
        if self.text_encoders is None or weights == "frozen":
            return select(self._encoded, [self._rows[prompt] for prompt in prompts])
        with self._using(weights):
            encoded = self.text_encoders(prompts, self.device)
        return {name: value.float() for name, value in encoded.items()}

    def __call__(
        self, model_input: torch.Tensor, timesteps: torch.Tensor, prompts: list[str], weights: str
    ) -> torch.Tensor:
        """One forward pass, `(B, C, H, W)`; gradients flow only if `weights` is `"student"` and they are enabled."""
        return self.predict(model_input, timesteps, self.conditioning(prompts, weights), weights)

    def predict(
        self, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, weights: str
    ) -> torch.Tensor:
        self.forwards += len(model_input)
        with self._using(weights) as learns:
            denoiser = self.student if learns else self.family.denoiser
            return self.family.predict(denoiser, model_input, timesteps, conditioning).float()

    @contextmanager
    def _using(self, weights: str) -> Iterator[bool]:
        """Computes with these weights inside the block; gives whether gradients flow."""
        learns = weights == "student" and torch.is_grad_enabled()
        with self.weights.use(weights), torch.set_grad_enabled(learns):
            yield learns
