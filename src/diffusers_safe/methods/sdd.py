"""SDD: Safe self-Distillation Diffusion, Kim et al., ICML 2023 workshop, arXiv 2307.05977."""

from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import option
from ..concepts import joined, names_concept
from ..values import choose
from .method import GradientMethod, register_method
from .objective import Objective, TrainingBatch, squared_error, targets
from .predictor import Predictor


SDD_TARGETS = ("student", "frozen")


class SDDObjective(Objective):
    """The student's prediction for the concept moves to its own unconditional prediction.

    With the paper's rule, `target="student"`, ignoring the text altogether is a solution: the loss is 0 and every
    concept is gone. `target="frozen"` is the prediction of the base model, which cannot drift. Other concepts and the
    unconditional prediction are kept by [`retention_loss`].

    A model that shows the concept now and then without being asked has it in its unconditional prediction, and an
    erasure towards that cannot be complete. Two variants go further:

    * `target_prompt` a: the concept becomes this one instead of nothing (a weapon, a plant), as in Concept Ablation
      (Kumari et al., arXiv 2303.13516), which is a separate method here ([`ConceptAblation`]).
    * `negative_guidance_scale` eta > 0: the target moves away from `negative_prompt` n, as ESD's does (Gandikota et
      al., arXiv 2303.07345), with the base model eps*:

            target - eta * (eps*(z_t, n) - eps*(z_t, ""))

    Args:
        target (`str`, defaults to `"student"`): One of `SDD_TARGETS`.
        target_prompt (`str`, defaults to `""`): a; `""` is the paper's rule.
        negative_guidance_scale (`float`, defaults to 0.0): eta, at least 0; 0 is the paper's rule.
        negative_prompt (`str`, *optional*): n, all concepts joined; eta needs it.

    Raises:
        `ValueError`: If the target is unknown, or the scale is below 0 or without a prompt.
    """

    name = "sdd"
    trajectory_weights = "ema"
    output_weights = "ema"

    def __init__(
        self,
        target: str = "student",
        target_prompt: str = "",
        negative_guidance_scale: float = 0.0,
        negative_prompt: str = "",
    ):
        if negative_guidance_scale < 0:
            raise ValueError(f"negative_guidance_scale {negative_guidance_scale}: must be at least 0")
        if negative_guidance_scale and not negative_prompt:
            raise ValueError(f"negative_guidance_scale {negative_guidance_scale}: needs a negative_prompt")
        self.target, self.target_prompt = choose("sdd_target", target, SDD_TARGETS), target_prompt
        self.negative_guidance_scale, self.negative_prompt = negative_guidance_scale, negative_prompt
        self.prompts = (target_prompt, *([negative_prompt] if negative_guidance_scale else []))

    def loss(self, predictor: Predictor, batch: TrainingBatch) -> torch.Tensor:
        # Equation 6: || stopgrad(eps(z_t, "")) - eps(z_t, c_s) ||^2
        target = self._target(predictor, batch)
        return squared_error(predictor(batch.model_input, batch.timesteps, batch.prompts, "student"), target)

    def _target(self, predictor: Predictor, batch: TrainingBatch) -> torch.Tensor:
        count = len(batch.prompts)
        towards, away, nothing = [self.target_prompt] * count, [self.negative_prompt] * count, [""] * count
        if not self.negative_guidance_scale:
            return targets(predictor, batch, [towards], self.target)[0]
        if self.target == "frozen":
            target, negative, empty = targets(predictor, batch, [towards, away, nothing], "frozen")
        else:
            (target,) = targets(predictor, batch, [towards], self.target)
            negative, empty = targets(predictor, batch, [away, nothing], "frozen")
        return target - self.negative_guidance_scale * (negative - empty)


@register_method
@dataclass(kw_only=True)
class SDD(GradientMethod):
    """The options of SDD."""

    name = "sdd"
    title = "Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models"
    authors = "Kim et al., ICML 2023 workshop"
    paper = "2307.05977"
    summary = "The prediction for a concept moves to the model's own unconditional prediction."

    ema_decay: float = option(
        0.999, "Decay of the EMA of the weights. The EMA model samples the latents and is saved.", at_least=0, below=1
    )
    sdd_target: str = option(
        "student",
        "Model whose prediction is the target: student (the one that trains, as in the paper) or frozen (the base "
        "model, which cannot drift).",
        SDD_TARGETS,
        essential=True,
    )
    target_prompt: str = option(
        "",
        "Prompt that the concept is replaced by, as in concept_ablation. Default: the empty prompt, as in the paper.",
        essential=True,
    )
    negative_guidance_scale: float = option(
        0.0,
        "Scale eta by which the target moves away from the prediction for all concepts joined, as in ESD. For models "
        "that generate the concept without being asked. The paper uses 0.",
        at_least=0,
    )

    def check(self, options: Any) -> None:
        concepts = options.concept.concepts
        if named := [concept for concept in concepts if names_concept(self.target_prompt, concept)]:
            raise ValueError(f"target_prompt '{self.target_prompt}': names {', '.join(named)}, which is to be erased")
        if self.negative_guidance_scale and options.concept.concept_schedule == "sequential":
            raise ValueError(
                f"negative_guidance_scale {self.negative_guidance_scale}: moves away from all concepts at once, which "
                "concept_schedule sequential must not know yet; allowed are the other schedules"
            )

    def objective(self, concepts: list[str]) -> SDDObjective:
        return SDDObjective(self.sdd_target, self.target_prompt, self.negative_guidance_scale, joined(concepts))
