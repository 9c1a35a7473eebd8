"""Safe self-Distillation Diffusion: Kim et al., ICML 2023 workshop, arXiv 2307.05977."""

import torch

from ..arguments import choose
from .objective import Objective, TrainingBatch, squared_error, targets
from .predictor import Predictor


SDD_TARGETS = ("student", "frozen")


class SDDObjective(Objective):
    """The student's prediction for the concept moves to its own prediction without any.

    With `target="student"`, the paper's rule, "ignore the text altogether" is a solution: the loss is 0 and every
    concept is gone. `target="frozen"` is the prediction of the base model, which cannot wander. What else keeps other
    concepts, and the unconditional prediction, is [`retention_loss`].

    A model that draws the concept now and then without being asked has it in its unconditional prediction, and no
    erasure towards that can be complete. There are two ways past it:

    * `target_prompt` a: the concept becomes this one instead of nothing (a weapon, a plant), as in Concept Ablation
      (Kumari et al., arXiv 2303.13516).
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
        target = choose("sdd_target", target, SDD_TARGETS)
        if negative_guidance_scale < 0:
            raise ValueError(f"negative_guidance_scale {negative_guidance_scale}: must be at least 0")
        if negative_guidance_scale and not negative_prompt:
            raise ValueError(f"negative_guidance_scale {negative_guidance_scale}: needs a negative_prompt")
        self.target, self.target_prompt = target, target_prompt
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
