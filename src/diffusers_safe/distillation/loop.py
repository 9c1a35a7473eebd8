"""The loop of distillation: noisy images, what student and teacher make of them, and the terms of the loss."""

from contextlib import nullcontext

import torch
from accelerate import Accelerator

from ..diffusion.generators import sample_generator
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.noise import NoiseSchedule
from ..diffusion.trajectories import Trajectories
from ..families import ModelFamily
from ..methods.predictor import Predictor
from ..methods.sdd import SDDObjective
from ..provenance import fingerprint
from ..training.loop import TrainingLoop
from ..training.pictures import LatentSource
from ..training.trajectory_sources import LiveSamples
from .objective import Features, FeatureTap, feature_pairs
from .options import DistillationOptions


HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class DistillationLoop(TrainingLoop):
    """Trains a student on images and on its teacher; `run` leaves the published weights in the student.

    The teacher is frozen, outside `accelerator.prepare`, and in half precision where the run's is.

    Args:
        accelerator (`Accelerator`): Devices, processes, mixed precision.
        teacher (`ModelFamily`): Whose denoiser teaches.
        student (`ModelFamily`): Whose denoiser is trained in place; the rest of its pipeline is the teacher's.
        data (`LatentSource`): Latents of images, and their encoded captions.
        options (`DistillationOptions`): Everything else.

    Attributes:
        taught_by (`str`): [`fingerprint`] of the teacher's denoiser.
    """

    name = "distillation"

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: ModelFamily,
        student: ModelFamily,
        data: LatentSource,
        options: DistillationOptions,
    ):
        self.taught_by = fingerprint(teacher.denoiser)
        super().__init__(accelerator, student.denoiser, options)
        self.output_weights = "ema" if options.result.use_ema else "student"
        self.objective, noise = options.loss.objective(), options.noise
        self.term_weights = {**self.objective.weights, "sdd": options.loss.sdd_weight}
        self.data, self.family, self.teacher_family = data, student, teacher
        self.noise = NoiseSchedule(
            student.pipeline.scheduler,
            options.loss.snr_gamma,
            noise.timestep_bias,
        )
        self.loss_weighting = LossWeighting(options.sampling.loss_space, self.noise.scheduler)
        self.teacher_dtype = HALF.get(accelerator.mixed_precision, torch.float32)
        if self.objective.needs_teacher:
            teacher.denoiser.requires_grad_(False).eval().to(accelerator.device)
            if self.teacher_dtype != torch.float32:
                torch.nn.Module.to(teacher.denoiser, self.teacher_dtype)  # diffusers' own warns
        self.student_tap = self.teacher_tap = None
        if "feature" in self.objective.weights:
            pairs = feature_pairs(student.denoiser.config, teacher.denoiser.config, options.loss.feature_map)
            self.student_tap = FeatureTap(student.denoiser, [own for own, _ in pairs])
            self.teacher_tap = FeatureTap(teacher.denoiser, [other for _, other in pairs])
        self._forwards = 0
        self._seen_to_learn = False
        self.predictor = None
        parts = [self.data]
        if options.loss.sdd_weight:
            self._set_up_sdd()
            parts.append(self.erasing)
        self.make_resumable(*parts, taught_by=self.taught_by, data=data.identity)

    @property
    def forwards(self) -> int:
        return self._forwards + (self.predictor.forwards if self.predictor else 0)

    def close(self) -> None:
        """Takes the hooks off both denoisers."""
        for tap in (self.student_tap, self.teacher_tap):
            if tap is not None:
                tap.remove()

    def _set_up_sdd(self) -> None:
        sampling, concepts = self.options.sampling, self.options.data.forbidden_concepts
        self.sdd = SDDObjective()
        predictor = Predictor(self.family, self.weights, concepts, self.accelerator.device, self.student)
        trajectories = Trajectories(
            self.family.make_scheduler,
            self.family.latent_shape,
            sampling.num_inference_steps,
            sampling.sampling_guidance_scale,
        )
        self.predictor = predictor

        def in_turn(number: int, generator: torch.Generator) -> tuple[str, str]:
            return (concepts[number % len(concepts)],) * 2

        self.erasing = LiveSamples(
            "erase",
            self.output_weights,
            in_turn,
            predictor,
            trajectories,
            sampling,
            self.options.output.seed,
            self.samples_a_step,
        )

    def prepare(self) -> None:
        self.data.prepare()

    def most_ema_decay(self, step: int) -> float:
        return (1 + step) / (10 + step)

    # --- one batch ---------------------------------------------------------------------------------------------------

    def batch_terms(self, step: int, slots: range) -> dict[str, torch.Tensor]:
        generators = [
            sample_generator(self.options.output.seed, "noise", step * self.samples_a_step + slot) for slot in slots
        ]
        batch = self.data.batch(step, slots)
        noisy = self.noise.add(batch.latents, generators)
        inputs = (noisy.model_input, noisy.timesteps, batch.conditioning)
        student_pred, student_features = self._predict(self.student, self.family, self.student_tap, *inputs)
        if not self._seen_to_learn:
            self._check_gradients(student_pred, student_features)
        teacher_pred, teacher_features = self._teach(*inputs)
        losses = self.objective.losses(student_pred, noisy.target, teacher_pred, student_features, teacher_features)
        if "task" in losses:
            losses["task"] = losses["task"] * self.noise.snr_weights(noisy.timesteps)
        for name in losses.keys() & {"task", "output"}:
            losses[name] = self.loss_weighting.weigh(losses[name], noisy.timesteps)
        terms = {name: values.mean() for name, values in losses.items()}
        if self.options.loss.sdd_weight:
            sampled = self.erasing.batch(step, slots)
            losses = self.sdd.loss(self.predictor, sampled)
            terms["sdd"] = self.loss_weighting.weigh(losses, sampled.timesteps).mean()
        return terms

    def _predict(
        self, denoiser, family: ModelFamily, tap: FeatureTap | None, *inputs
    ) -> tuple[torch.Tensor, Features]:
        self._forwards += len(inputs[0])
        with tap or nullcontext():
            noise_pred = family.predict(denoiser, *inputs)
        return noise_pred.float(), tap.take() if tap else []

    @torch.no_grad()
    def _teach(self, model_input, timesteps, conditioning) -> tuple[torch.Tensor | None, Features]:
        if not self.objective.needs_teacher:
            return None, []
        # Sizes are embedded in float32: bfloat16 does not know 1365 from 1368.
        half = {
            name: value if name == "time_ids" else value.to(self.teacher_dtype) for name, value in conditioning.items()
        }
        denoiser = self.teacher_family.denoiser
        inputs = (model_input.to(self.teacher_dtype), timesteps, half)
        return self._predict(denoiser, self.teacher_family, self.teacher_tap, *inputs)

    def _check_gradients(self, student_pred: torch.Tensor, features: Features) -> None:
        """What carries no gradient would be logged and teach nothing (as under reentrant checkpointing)."""
        self._seen_to_learn = True
        names = self.student_tap.names if self.student_tap else []
        outputs = {"the prediction": student_pred, **dict(zip(names, features))}
        if silent := [name for name, value in outputs.items() if not value.requires_grad]:
            raise ValueError(
                f"feature_map {self.options.loss.feature_map}: {', '.join(silent)} of the student sends no "
                "gradient to the weights that train"
            )
