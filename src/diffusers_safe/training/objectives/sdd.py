"""Safe self-Distillation Diffusion: Kim et al., ICML 2023 workshop, arXiv 2307.05977."""

import torch

from ..predictor import Predictor
from .base import Objective, TrainingBatch, squared_error


SDD_TARGETS = ("student", "frozen")


class SDDObjective(Objective):
    """The student's prediction for the concept moves to its own prediction without any.

    With `target="student"`, the paper's rule, "ignore the text altogether" is a solution: the loss is 0 and every
    concept is gone. `target="frozen"` holds the target where the base model had it, so the unconditional prediction
    cannot wander; what else keeps other concepts is [`retention_loss`].

    Args:
        target (`str`, defaults to `"student"`): Whose unconditional prediction is the target.
    """

    name = "sdd"
    sampler = "ema"
    publishes = "ema"

    def __init__(self, target: str = "student"):
        if target not in SDD_TARGETS:
            raise ValueError(f"sdd_target '{target}': unknown; allowed are {', '.join(SDD_TARGETS)}")
        self.target = target

    def loss(self, predictor: Predictor, batch: TrainingBatch) -> torch.Tensor:
        # Equation 6: || stopgrad(eps(z_t, "")) - eps(z_t, c_s) ||^2
        unconditional = [""] * len(batch.prompts)
        with torch.no_grad():
            target = predictor(batch.model_input, batch.timesteps, unconditional, self.target)
        noise_pred = predictor(batch.model_input, batch.timesteps, batch.prompts, "student")
        return squared_error(noise_pred, target)
