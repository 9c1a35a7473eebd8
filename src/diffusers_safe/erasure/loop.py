"""The loop of every erasure: sample latents, compute the losses of objective and retention, watch for collapse."""

import logging
import math
from dataclasses import replace

import torch
from accelerate import Accelerator

from ..concepts import ConceptSchedule
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.trajectories import Trajectories
from ..families import ModelFamily
from ..messages import note
from ..methods import Objective, TrainingBatch
from ..methods.predictor import Predictor
from ..methods.retention import retention_loss
from ..training.loop import TrainingLoop
from ..training.run_log import ConceptLosses
from ..training.trajectory_sources import LiveSamples, PooledSamples, Prompts, SampleSource
from .job import TrainedErasureOptions, encoded_prompts, trained_module
from .watch import DRIFT_WARNING, Watch


logger = logging.getLogger(__name__)


class ErasureLoop(TrainingLoop):
    """Trains an objective on a family; `run` leaves the published weights in its pipeline.

    Args:
        accelerator (`Accelerator`): Devices, processes, mixed precision.
        family (`ModelFamily`): Its denoiser, or text encoders, are trained in place.
        objective (`Objective`): The loss.
        options (`TrainedErasureOptions`): Everything else.
    """

    def __init__(
        self, accelerator: Accelerator, family: ModelFamily, objective: Objective, options: TrainedErasureOptions
    ):
        trained = trained_module(family, options.weights.train_method)
        super().__init__(accelerator, trained, options)
        if trained is not family.denoiser:
            family.denoiser.to(accelerator.device).requires_grad_(False)
            accelerator.prepare_model(family.denoiser, evaluation_mode=True)  # for mixed precision
        self.objective = objective
        self.name, self.output_weights = objective.name.upper(), objective.output_weights
        concept, retention, sampling = options.concept, options.retention, options.sampling
        self.term_weights = {
            "erase": 1.0,
            **dict.fromkeys(("retain", "retain_unconditional"), retention.retain_weight),
        }
        num_trajectories = math.ceil(options.run.max_train_steps / sampling.latents_per_trajectory)
        num_trajectories *= self.samples_a_step
        self.schedule = ConceptSchedule(
            concept.concepts, concept.concept_schedule, concept.prompt_order, num_trajectories
        )
        prompts = encoded_prompts(options)
        self.predictor = Predictor(family, self.weights, prompts, accelerator.device, self.student)
        self.trajectories = Trajectories(
            family.make_scheduler,
            family.latent_shape,
            sampling.num_inference_steps,
            sampling.sampling_guidance_scale,
            family.guidance_name,
        )
        self.erasing = self._make_source("erase", objective.trajectory_weights, self._to_erase)
        self.retaining = self._make_source("retain", "frozen", self._to_retain)
        self.loss_weighting = LossWeighting(sampling.loss_space, family.pipeline.scheduler)
        self.watch = Watch(
            self.predictor, self.trajectories, concept.concepts, retention.watch_prompts, options.output.seed
        )
        for silent in self.watch.silent:
            note("concepts '%s': its predictions equal the empty prompt's, so there is nothing to erase", silent)
        self.concept_losses = ConceptLosses(prompts)
        self._warned = False
        own_state = type(objective).state_dict is not Objective.state_dict
        self.make_resumable(self.erasing, self.retaining, *([objective] if own_state else []))

    def _make_source(self, term: str, weights: str, prompts: Prompts) -> SampleSource:
        """Where the samples of a term of the loss come from: a pool, or new trajectories."""
        options, sampling = self.options, self.options.sampling
        source = (term, weights, prompts, self.predictor, self.trajectories, sampling, options.output.seed)
        if term not in options.pooled_terms():
            return LiveSamples(*source, self.samples_a_step)
        num_samples = options.run.max_train_steps * self.samples_a_step
        return PooledSamples(*source, self.samples_a_step, size=sampling.trajectory_pool, num_samples=num_samples)

    @property
    def forwards(self) -> int:
        return self.predictor.forwards

    def prepare(self) -> None:
        self.erasing.prepare()
        self.retaining.prepare()

    def _to_erase(self, number: int, generator: torch.Generator) -> tuple[str, str]:
        sampled, trained = self.schedule.prompts(number, generator)
        return self.objective.trajectory_prompt or sampled, trained

    def _to_retain(self, number: int, generator: torch.Generator) -> tuple[str, str]:
        prompts = self.options.retention.retain_prompts
        prompt = prompts[number % len(prompts)]
        return prompt, prompt

    def batch_terms(self, step: int, slots: range) -> dict[str, torch.Tensor]:
        retention, batch = self.options.retention, self.erasing.batch(step, slots)
        losses = self.loss_weighting.weigh(self.objective.loss(self.predictor, batch), batch.timesteps)
        self.concept_losses.add(self._concepts_of(batch), losses)
        terms = {"erase": losses.mean()}
        if retention.trained_prompts:
            terms["retain"] = self._retention(self.retaining.batch(step, slots))
        if retention.keeps_unconditional:
            terms["retain_unconditional"] = self._retention(replace(batch, prompts=[""] * len(slots)))
        return terms

    def _concepts_of(self, batch: TrainingBatch) -> list[str]:
        """What the losses of a batch are counted under: of the two prompts of a sample, the one concept."""
        guided_by_one = self.options.concept.prompt_order == "paper" and self.objective.trajectory_prompt is None
        return batch.trajectory_prompts if guided_by_one else batch.prompts

    def _retention(self, batch: TrainingBatch) -> torch.Tensor:
        return self.loss_weighting.weigh(retention_loss(self.predictor, batch), batch.timesteps).mean()

    def is_reached(self) -> bool:
        target = self.options.concept.target
        return target is not None and self.last_measured["concept_left"] <= target

    def measure(self, step: int) -> dict:
        watched = self.watch.measure(self.output_weights)
        if watched.get("drift", 0) > DRIFT_WARNING and not self._warned and self.accelerator.is_main_process:
            self._warned = True
            logger.warning(
                "step %d: predictions for unrelated prompts have moved by %.0f %% of their effect; the model may be "
                "collapsing: lower --learning_rate, or give --retain_prompts",
                step,
                100 * watched["drift"],
            )
        return {**watched, "by_concept": self.concept_losses.take(self.accelerator)}
