"""Watches, while a model forgets, how much of the concept is left and whether unrelated prompts begin to move."""

import math

import torch

from ..diffusion.trajectories import Trajectories
from ..methods.predictor import Predictor


MOST_PROMPTS = 4
LEFT_WARNING = 0.5  # of `concept_left`
DRIFT_WARNING = 0.5
SAYS_NOTHING = 1e-4  # of the unconditional prediction's length: what rounding makes


class Watch:
    """Compares a model with the frozen one at fixed latents, a few forwards each time.

    What a prompt "says" at a latent is the difference between its prediction and the unconditional one. Erasure means
    that the concept's words say nothing; collapse means that other prompts' predictions leave the frozen model's.

    Args:
        predictor (`Predictor`): Knows all prompts below.
        trajectories (`Trajectories`): Samples the fixed latents, with the frozen model.
        concepts (`list[str]`): What is erased; of many, a few spread evenly over the list are watched.
        unrelated (`list[str]`): What should stay; at most `MOST_PROMPTS` are watched.
        seed (`int`): Of the latents.
        anchors (`list[str]`, *optional*): What each concept becomes, if not nothing.
        progress (`float`, defaults to 0.4): Share of the schedule after which latents are taken; 0 is pure noise,
            which costs nothing to sample.

    Attributes:
        silent (`list[str]`): Watched concepts whose predictions are those of the empty prompt, up to rounding.
    """

    def __init__(
        self,
        predictor: Predictor,
        trajectories: Trajectories,
        concepts: list[str],
        unrelated: list[str],
        seed: int,
        progress: float = 0.4,
        anchors: list[str] | None = None,
    ):
        step = math.ceil(len(concepts) / MOST_PROMPTS)
        concepts = concepts[::step]
        unrelated = unrelated[:MOST_PROMPTS]
        self.predictor, self.concepts, self.unrelated = predictor, concepts, unrelated
        count = trajectories.positions[int(progress * len(trajectories.positions))]
        # One prompt at a time: all of them at once would take more memory than a step of training.
        self._inputs = [
            trajectories.sample(
                lambda *inputs: predictor.predict(*inputs, weights="frozen"),
                predictor.conditioning([prompt]),
                predictor.conditioning([""]),
                [[count]],
                [torch.Generator().manual_seed(seed + i)],
                predictor.device,
            )
            for i, prompt in enumerate([*concepts, *unrelated])
        ]
        self._frozen, frozen_empty = self._predictions("frozen")
        self._anchors = None if anchors is None else self._anchored(anchors[::step])
        self._said = self._frozen - frozen_empty
        alike = _length(self._said) < SAYS_NOTHING * _length(frozen_empty)
        self.silent = [concept for concept, same in zip(concepts, alike.tolist()) if same]

    def _anchored(self, anchors: list[str]) -> torch.Tensor:
        """What the frozen model predicts for the anchors at the concepts' latents."""
        return torch.cat(
            [self.predictor(*inputs, [anchor], "frozen") for inputs, anchor in zip(self._inputs, anchors)]
        )

    @torch.no_grad()
    def _predictions(self, weights: str) -> tuple[torch.Tensor, torch.Tensor]:
        """For each prompt and for none, `(number of prompts, C, H, W)` each."""
        pairs = [
            self.predictor(model_input.repeat(2, 1, 1, 1), timesteps.repeat(2), [prompt, ""], weights)
            for (model_input, timesteps), prompt in zip(self._inputs, [*self.concepts, *self.unrelated])
        ]
        return torch.stack(pairs).unbind(dim=1)

    def measure(self, weights: str) -> dict[str, float]:
        """Returns `"concept_left"`, how much of what the concepts' words said they still say: 1 at the start, 0 when
        they say nothing, or what their anchors say, below 0 when they say the opposite; and `"drift"`, the distance of
        unrelated predictions from the frozen ones relative to what their prompts say, 0 at the start."""
        predictions, empty = self._predictions(weights)
        count = len(self.concepts)
        said = _length(self._said)
        if self._anchors is None:
            left = (_dot(predictions - empty, self._said) / said**2)[:count]
        else:
            whole = self._frozen[:count] - self._anchors
            left = _dot(predictions[:count] - self._anchors, whole) / _length(whole) ** 2
        result = {"concept_left": left.mean().item()}
        if self.unrelated:
            result["drift"] = (_length(predictions - self._frozen) / said)[count:].mean().item()
        return result


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first * second).flatten(1).sum(dim=1)


def _length(difference: torch.Tensor) -> torch.Tensor:
    return _dot(difference, difference).sqrt().clamp_min(1e-6)
