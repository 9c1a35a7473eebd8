"""Concept Ablation: Kumari et al., ICCV 2023, arXiv 2303.13516, the model-based variant."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..arguments import option, required
from ..concepts import is_visible, names_concept
from ..values import choose
from .method import GradientMethod, register_method
from .objective import Objective, TrainingBatch, squared_error, targets
from .predictor import Predictor


ANCHOR_WEIGHTS = ("student", "frozen")


class ConceptAblationObjective(Objective):
    """The student's prediction for the concept moves to its own prediction for an anchor concept.

    With the student eps, a concept c and an anchor a (equation 5 of the paper, with its stop-gradient):

        || eps(z_t, c) - stopgrad(eps(z_t, a)) ||^2

    In the paper z_t is noise added to images that the base model generates for the anchor. Here a latent of the base
    model's guided trajectory towards the anchor, stopped at that noise level, replaces it. `--retain_prompts` with the
    anchor takes the place of the paper's optional term, the usual loss on anchor images.

    Args:
        anchor_prompt (`str`): a.
        anchor_weights (`str`, defaults to `"student"`): Whose prediction is the target: the student's, as in the
            paper, or the frozen base model's, which cannot drift.

    Raises:
        `ValueError`: If the weights are unknown.
    """

    name = "concept_ablation"
    trajectory_weights = "frozen"
    output_weights = "student"

    def __init__(self, anchor_prompt: str, anchor_weights: str = "student"):
        self.anchor_prompt = anchor_prompt
        self.anchor_weights = choose("anchor_weights", anchor_weights, ANCHOR_WEIGHTS)
        self.prompts, self.trajectory_prompt = (anchor_prompt,), anchor_prompt

    def loss(self, predictor: Predictor, batch: TrainingBatch) -> torch.Tensor:
        anchors = [self.anchor_prompt] * len(batch.prompts)
        (target,) = targets(predictor, batch, [anchors], self.anchor_weights)
        return squared_error(predictor(batch.model_input, batch.timesteps, batch.prompts, "student"), target)


@register_method
@dataclass(kw_only=True)
class ConceptAblation(GradientMethod):
    """The options of Concept Ablation. Defaults are those of the authors' code for a style on one GPU: 100 steps of 8,
    learning rate 2e-6 times the batch size, keys and values of cross-attention."""

    name = "concept_ablation"
    title = "Ablating Concepts in Text-to-Image Diffusion Models"
    authors = "Kumari et al., ICCV 2023"
    paper = "2303.13516"
    summary = "The prediction for a concept moves to the prediction for an anchor concept."
    defaults: ClassVar[dict[str, Any]] = {
        "prompt_order": "matched",
        "train_method": "xattn-strict",
        "max_train_steps": 100,
        "train_batch_size": 8,
        "learning_rate": 2e-6,
        "scale_lr": True,
    }

    anchor_prompt: str = required("Prompt that the concept is replaced by, such as 'a painting' for an artist.")
    anchor_weights: str = option(
        "student",
        "Model whose prediction for --anchor_prompt is the target: student (the one that trains, as in the paper) or "
        "frozen (the base model, which cannot drift).",
        ANCHOR_WEIGHTS,
    )

    def __post_init__(self):
        if not is_visible(self.anchor_prompt):
            raise ValueError("anchor_prompt: is blank; give a prompt that replaces the concepts, such as 'a painting'")

    def check(self, options: Any) -> None:
        if named := [name for name in options.concept.concepts if names_concept(self.anchor_prompt, name)]:
            raise ValueError(f"anchor_prompt '{self.anchor_prompt}': names {', '.join(named)}, which is to be erased")

    def objective(self, concepts: list[str]) -> ConceptAblationObjective:
        return ConceptAblationObjective(self.anchor_prompt, self.anchor_weights)
