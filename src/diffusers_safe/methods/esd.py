"""Erasing concepts from Stable Diffusion: Gandikota et al., ICCV 2023, arXiv 2303.07345."""

import torch

from ..arguments import choose
from .objective import Objective, TrainingBatch, squared_error, targets
from .predictor import Predictor


ESD_SAMPLERS = ("student", "frozen")


class ESDObjective(Objective):
    """The student's prediction for the concept moves to the opposite of what the base model says of it.

    With the student eps, the base model eps*, a concept c, and eta:

        || eps(z_t, c) - (eps*(z_t, "") - eta * (eps*(z_t, c) - eps*(z_t, ""))) ||^2

    With `erase_from` f, the concept is taken out of what that prompt says, and other prompts are left alone ("Van
    Gogh" from "a painting"); the latents are then drawn with f, too. The rule is that of the authors' code of 2025:

        || eps(z_t, f) - (eps*(z_t, f) - eta * (eps*(z_t, c) - eps*(z_t, ""))) ||^2

    Args:
        negative_guidance_scale (`float`, defaults to 1.0): eta, at least 0, as in the paper. (In the code of 2025 f is
            c unless given, and its `negative_guidance` is then eta + 1.)
        erase_from (`str`, *optional*): f; the paper's rule without it.
        trajectory_weights (`str`, defaults to `"student"`): Whose weights sample the latents: the student's (the
            paper) or the frozen base model's (the code of 2025).

    Raises:
        `ValueError`: If the scale is below 0 or the weights unknown.
    """

    name = "esd"
    output_weights = "student"

    def __init__(
        self, negative_guidance_scale: float = 1.0, erase_from: str | None = None, trajectory_weights: str = "student"
    ):
        if not negative_guidance_scale >= 0:
            raise ValueError(f"negative_guidance_scale {negative_guidance_scale}: must be at least 0")
        trajectory_weights = choose("trajectory_weights", trajectory_weights, ESD_SAMPLERS)
        self.negative_guidance_scale, self.erase_from, self.trajectory_weights = (
            negative_guidance_scale,
            erase_from,
            trajectory_weights,
        )
        self.prompts = () if erase_from is None else (erase_from,)
        self.trajectory_prompts = erase_from

    def loss(self, predictor: Predictor, batch: TrainingBatch) -> torch.Tensor:
        count = len(batch.prompts)
        trained = batch.prompts if self.erase_from is None else [self.erase_from] * count
        target = self._target(predictor, batch, trained if self.erase_from is not None else [""] * count)
        return squared_error(predictor(batch.model_input, batch.timesteps, trained, "student"), target)

    def _target(self, predictor: Predictor, batch: TrainingBatch, base: list[str]) -> torch.Tensor:
        if not self.negative_guidance_scale:
            return targets(predictor, batch, [base], "frozen")[0]
        nothing = [""] * len(batch.prompts)
        start, concept, empty = targets(predictor, batch, [base, batch.prompts, nothing], "frozen")
        return start - self.negative_guidance_scale * (concept - empty)  # equation 7
