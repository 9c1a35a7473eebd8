"""Retention: a loss that keeps the predictions for other prompts, added to any erasure objective."""

import torch

from .objective import TrainingBatch, squared_error
from .predictor import Predictor


def retention_loss(predictor: Predictor, batch: TrainingBatch) -> torch.Tensor:
    """|| eps(z_t, r) - eps*(z_t, r) ||^2 for prompts r to keep and the frozen model eps*; `(B,)`.

    Not part of ESD or SDD; the idea is that of the anchors in Concept Ablation (Kumari et al., arXiv 2303.13516) and
    of the preservation term in UCE (Gandikota et al., arXiv 2308.14761).
    """
    with torch.no_grad():
        target = predictor(batch.model_input, batch.timesteps, batch.prompts, "frozen")
    noise_pred = predictor(batch.model_input, batch.timesteps, batch.prompts, "student")
    return squared_error(noise_pred, target)
