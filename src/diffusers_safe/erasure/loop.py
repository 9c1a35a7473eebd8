"""The loop of every erasure: draw latents, ask the objective, keep what must stay, watch."""

import logging
import math
from dataclasses import replace

import torch
from accelerate import Accelerator

from ..arguments import note
from ..concepts import ConceptSchedule
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.trajectories import Trajectories
from ..families import ModelFamily
from ..methods import Objective, TrainingBatch
from ..methods.predictor import Predictor
from ..methods.retention import retention_loss
from ..training.loop import TrainingLoop
from ..training.run_log import ConceptLosses
from .arguments import ErasureArguments
from .sources import make_source
from .watch import Watch


logger = logging.getLogger(__name__)
DRIFT_WARNING = 0.5


class ErasureLoop(TrainingLoop):
    """Trains an objective on a family; `run` leaves the published weights in the denoiser.

    Args:
        accelerator (`Accelerator`): Devices, processes, mixed precision.
        family (`ModelFamily`): Its denoiser is trained in place.
        objective (`Objective`): The method.
        args (`ErasureArguments`): Everything else.
        ema_decay (`float`, *optional*): For objectives that have an EMA.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: ModelFamily,
        objective: Objective,
        args: ErasureArguments,
        ema_decay: float | None = None,
    ):
        super().__init__(accelerator, family.denoiser, args, ema_decay)
        self.objective = objective
        self.name, self.output_weights = objective.name.upper(), objective.output_weights
        self.term_weights = {"erase": 1.0, "retain": args.retain_weight, "retain_unconditional": args.retain_weight}
        num_trajectories = math.ceil(args.max_train_steps / args.latents_per_trajectory) * self.samples_a_step
        self.schedule = ConceptSchedule(args.concepts, args.concept_schedule, args.prompt_order, num_trajectories)
        prompts = [*self.schedule.all_prompts(), *objective.prompts, *args.retain_prompts, *args.watch_prompts]
        self.predictor = Predictor(family, self.weights, prompts, accelerator.device, self.student)
        self.trajectories = Trajectories(
            family.make_scheduler, family.latent_shape, args.num_inference_steps, args.sampling_guidance_scale
        )
        drawn = (self.predictor, self.trajectories, args, self.samples_a_step)
        self.erasing = make_source("erase", objective.trajectory_weights, self._to_erase, *drawn)
        self.retaining = make_source("retain", "frozen", self._to_retain, *drawn)
        self.loss_space = LossWeighting(args.loss_space, family.pipeline.scheduler)
        self.watch = Watch(self.predictor, self.trajectories, args.concepts, args.watch_prompts, args.seed)
        for concept in self.watch.silent:
            note("concepts '%s': its predictions equal the empty prompt's, so there is nothing to erase", concept)
        self.concept_losses = ConceptLosses(prompts)
        self._warned = False
        self.make_resumable(self.erasing, self.retaining)

    @property
    def forwards(self) -> int:
        return self.predictor.forwards

    def prepare(self) -> None:
        self.erasing.prepare()
        self.retaining.prepare()

    def _to_erase(self, number: int, generator: torch.Generator) -> tuple[str, str]:
        sampled, trained = self.schedule.prompts(number, generator)
        return self.objective.trajectory_prompts or sampled, trained

    def _to_retain(self, number: int, generator: torch.Generator) -> tuple[str, str]:
        prompt = self.args.retain_prompts[number % len(self.args.retain_prompts)]
        return prompt, prompt

    def batch_terms(self, step: int, slots: range) -> dict[str, torch.Tensor]:
        args = self.args
        batch = self.erasing.batch(step, slots)
        losses = self.loss_space.weigh(self.objective.loss(self.predictor, batch), batch.timesteps)
        self.concept_losses.add(self._concepts_of(batch), losses)
        terms = {"erase": losses.mean()}
        if args.retain_weight > 0 and args.retain_prompts:
            terms["retain"] = self._retention(self.retaining.batch(step, slots))
        if args.retain_weight > 0 and args.retain_unconditional:
            terms["retain_unconditional"] = self._retention(replace(batch, prompts=[""] * len(slots)))
        return terms

    def _concepts_of(self, batch: TrainingBatch) -> list[str]:
        """What the losses of a batch are counted under: of the two prompts of a sample, the one concept."""
        draws_with_one = self.args.prompt_order == "paper" and self.objective.trajectory_prompts is None
        return batch.trajectory_prompts if draws_with_one else batch.prompts

    def _retention(self, batch: TrainingBatch) -> torch.Tensor:
        return self.loss_space.weigh(retention_loss(self.predictor, batch), batch.timesteps).mean()

    def measure(self, step: int) -> dict:
        watched = self.watch.measure(self.output_weights)
        if watched.get("drift", 0) > DRIFT_WARNING and not self._warned and self.accelerator.is_main_process:
            self._warned = True
            logger.warning(
                "step %d: prompts that should stay have moved %.0f %% of what they say; the model may be collapsing: "
                "lower --learning_rate, or give --retain_prompts",
                step,
                100 * watched["drift"],
            )
        return {**watched, "by_concept": self.concept_losses.take(self.accelerator)}
