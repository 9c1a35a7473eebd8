"""Safe self-Distillation Diffusion: Kim et al., ICML 2023 workshop, arXiv 2307.05977."""

from dataclasses import replace

import torch

from ..predictor import Predictor
from .base import Objective, TrainingBatch, squared_error
from .retention import retention_loss


SDD_TARGETS = ("student", "frozen", "anchored")


class SDDObjective(Objective):
    """The student's prediction for the concept moves to its own prediction without any.

    With `target="student"`, the paper's rule, "ignore the text altogether" is a solution: the loss is 0 and every
    concept is gone. `target="frozen"` is the unconditional prediction of the base model, which cannot wander. While
    generating, however, guidance multiplies the concept's distance to the model's *own* unconditional prediction.
    `target="anchored"` therefore keeps the paper's target, and adds a second term that holds it where the base model
    has it. What else keeps other concepts is [`retention_loss`].

    Args:
        target (`str`, defaults to `"student"`): One of `SDD_TARGETS`.
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
        empty = replace(batch, prompts=[""] * len(batch.prompts))
        with torch.no_grad():
            source = "frozen" if self.target == "frozen" else "student"
            target = predictor(batch.model_input, batch.timesteps, empty.prompts, source)
        noise_pred = predictor(batch.model_input, batch.timesteps, batch.prompts, "student")
        loss = squared_error(noise_pred, target)
        return loss + retention_loss(predictor, empty) if self.target == "anchored" else loss
