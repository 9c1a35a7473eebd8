"""What a gradient method minimises."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from .predictor import Predictor


@dataclass
class TrainingBatch:
    """Noisy latents of trajectories towards concepts, and the prompts to train on.

    Attributes:
        model_input (`torch.Tensor`): `(B, C, H, W)`, as the denoiser takes them.
        timesteps (`torch.Tensor`): `(B,)`.
        prompts (`list[str]`): B prompts.
        trajectory_prompts (`list[str]`): The B prompts that guided the trajectories.
    """

    model_input: torch.Tensor
    timesteps: torch.Tensor
    prompts: list[str]
    trajectory_prompts: list[str] = field(default_factory=list)


class Objective(ABC):
    """The loss of a gradient method.

    If an objective keeps state between steps (an attack, for example), `state_dict` returns it, and every checkpoint
    contains it.

    Attributes:
        name (`str`): As in `erasure.json`.
        trajectory_weights (`str`): Whose weights sample the latents: `"student"`, `"ema"` or `"frozen"`.
        output_weights (`str`): Whose weights are the result: `"student"` or `"ema"`.
        prompts (`tuple[str, ...]`): Prompts that it asks the predictor for, in addition to `""` and those of a batch.
        trajectory_prompt (`str`, *optional*): The prompt that guides all trajectories, instead of the concepts.
    """

    name: str
    trajectory_weights: str
    output_weights: str
    prompts: tuple[str, ...] = ()
    trajectory_prompt: str | None = None

    @abstractmethod
    def loss(self, predictor: Predictor, batch: TrainingBatch) -> torch.Tensor:
        """The loss of each sample, `(B,)`, not reduced."""

    def state_dict(self) -> dict:
        """What a resumed run cannot compute again."""
        return {}

    def load_state_dict(self, state: dict) -> None:  # noqa: B027, most have no state
        """Continues from a `state_dict`."""


def squared_error(noise_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over all but the first dimension, `(B,)`."""
    return (noise_pred - target).square().flatten(1).mean(dim=1)


@torch.no_grad()
def targets(predictor: Predictor, batch: TrainingBatch, prompts: list[list[str]], weights: str) -> list[torch.Tensor]:
    """Predictions without gradients for several lists of B prompts, in one forward pass: a tensor `(B, C, H, W)` per
    list. Equal lists are computed once."""
    different = list(dict.fromkeys(map(tuple, prompts)))
    count = len(different)
    texts = [text for own in different for text in own]
    inputs = (batch.model_input.repeat(count, 1, 1, 1), batch.timesteps.repeat(count))
    predictions = predictor(*inputs, texts, weights).chunk(count)
    return [predictions[different.index(tuple(own))] for own in prompts]
