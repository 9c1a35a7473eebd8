"""The loop of every erasure: draw latents, loss, step, EMA, checkpoint."""

import hashlib
import json
import logging
import math
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from ..backbones import Backbone
from ..concepts import ConceptSchedule
from ..lora import LoRAWeights
from ..provenance import write_text
from ..trajectories import Trajectories
from ..weights import TrainedWeights, select_parameters
from .arguments import ErasureArguments
from .checkpoints import checkpoint_step, save_checkpoint
from .loss_space import LossSpace
from .objectives import Objective, TrainingBatch
from .objectives.retention import retention_loss
from .predictor import Predictor
from .run_log import ConceptLosses, RunLog
from .sources import make_source
from .watch import Watch


logger = logging.getLogger(__name__)
DRIFT_WARNING = 0.5


def make_weights(denoiser: nn.Module, args: ErasureArguments, ema_decay: float | None = None) -> TrainedWeights:
    """What a run trains in a denoiser: the selected weights themselves, or a LoRA on them."""
    names = select_parameters(denoiser, args.train_method)
    if args.rank is None:
        return TrainedWeights(denoiser, names, ema_decay)
    return LoRAWeights(denoiser, names, ema_decay, rank=args.rank, alpha=args.lora_alpha, seed=args.seed)


def peak_learning_rate(args: ErasureArguments, num_processes: int) -> float:
    """`learning_rate`, with `scale_lr` times the samples of a step."""
    samples = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return args.learning_rate * (samples if args.scale_lr else 1)


class ErasureLoop:
    """Trains an objective on a backbone; `run` leaves the published weights in the denoiser.

    Args:
        accelerator (`Accelerator`): Devices, processes, mixed precision.
        backbone (`Backbone`): Its denoiser is trained in place.
        objective (`Objective`): The method.
        args (`ErasureArguments`): Everything else.
        ema_decay (`float`, *optional*): For objectives that have an EMA.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        backbone: Backbone,
        objective: Objective,
        args: ErasureArguments,
        ema_decay: float | None = None,
    ):
        self.accelerator, self.objective, self.args = accelerator, objective, args
        device = accelerator.device
        denoiser = backbone.denoiser.to(device)
        denoiser.train()
        if args.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.weights = make_weights(denoiser, args, ema_decay)
        self.batches_a_step = args.gradient_accumulation_steps
        self.samples_a_step = args.train_batch_size * self.batches_a_step * accelerator.num_processes
        self.optimizer = _adam_class(args.use_8bit_adam)(
            self.weights.student.values(),
            lr=peak_learning_rate(args, accelerator.num_processes),
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        num_trajectories = math.ceil(args.max_train_steps / args.latents_per_trajectory) * self.samples_a_step
        self.schedule = ConceptSchedule(args.concepts, args.concept_schedule, args.prompt_order, num_trajectories)
        prompts = [*self.schedule.all_prompts(), *objective.prompts, *args.retain_prompts, *args.watch_prompts]
        # The loop accumulates itself; what `accelerate launch` set would divide gradients a second time.
        accelerator.gradient_accumulation_steps = 1
        student, self.optimizer = accelerator.prepare(denoiser, self.optimizer)
        self.predictor = Predictor(backbone, self.weights, prompts, device, student)
        self.trajectories = Trajectories(
            backbone.make_scheduler, backbone.latent_shape, args.num_inference_steps, args.sampling_guidance_scale
        )
        drawn = (self.predictor, self.trajectories, args, self.samples_a_step)
        self.erasing = make_source("erase", objective.sampler, self._to_erase, *drawn)
        self.retaining = make_source("retain", "frozen", self._to_retain, *drawn)
        self.loss_space = LossSpace(args.loss_space, backbone.pipeline.scheduler)
        self.watch = Watch(self.predictor, self.trajectories, args.concepts, args.watch_prompts, args.seed)
        self.concept_losses = ConceptLosses(prompts)
        self._warned = False
        self._make_resumable()

    def _make_resumable(self) -> None:
        identity = RunIdentity(self.args, self.weights, self.samples_a_step)

        # The base model is on disk already: a checkpoint holds the trained weights only.
        def before_saving(models, weights, folder):
            weights.clear()
            if self.accelerator.is_main_process:
                identity.save(folder)

        # An optimizer of other weights would be refused, too, but without a word that helps.
        def before_loading(models, folder):
            models.clear()
            identity.check(folder)

        self.accelerator.register_save_state_pre_hook(before_saving)
        self.accelerator.register_load_state_pre_hook(before_loading)
        self.accelerator.register_for_checkpointing(self.weights, self.lr_scheduler, self.erasing, self.retaining)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _to_erase(self, number: int, generator: torch.Generator) -> tuple[str, str]:
        sampled, trained = self.schedule.prompts(number, generator)
        return self.objective.drawn_with or sampled, trained

    def _to_retain(self, number: int, generator: torch.Generator) -> tuple[str, str]:
        prompt = self.args.retain_prompts[number % len(self.args.retain_prompts)]
        return prompt, prompt

    def batch_loss(self, step: int, batch_number: int) -> dict[str, torch.Tensor]:
        """The terms of the loss of one batch of this process, each a mean over its samples."""
        size = self.args.train_batch_size
        first = (batch_number * self.accelerator.num_processes + self.accelerator.process_index) * size
        slots = range(first, first + size)
        batch = self.erasing.batch(step, slots)
        losses = self.loss_space.weigh(self.objective.loss(self.predictor, batch), batch.timesteps)
        self.concept_losses.add(self._concepts_of(batch), losses)
        terms = {"erase": losses.mean()}
        if self.args.retain_weight > 0 and self.args.retain_prompts:
            terms["retain"] = self._retention(self.retaining.batch(step, slots))
        if self.args.retain_weight > 0 and self.args.retain_unconditional:
            terms["retain_unconditional"] = self._retention(replace(batch, prompts=[""] * size))
        return terms

    def _concepts_of(self, batch: TrainingBatch) -> list[str]:
        """What the losses of a batch are counted under: of the two prompts of a sample, the one concept."""
        draws_with_one = self.args.prompt_order == "paper" and self.objective.drawn_with is None
        return batch.drawn_with if draws_with_one else batch.prompts

    def _retention(self, batch: TrainingBatch) -> torch.Tensor:
        return self.loss_space.weigh(retention_loss(self.predictor, batch), batch.timesteps).mean()

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns the mean of each term of the loss."""
        totals: dict[str, torch.Tensor] = {}
        for batch_number in range(self.batches_a_step):
            last = batch_number == self.batches_a_step - 1
            with self.accelerator.no_sync(self.predictor.student) if not last else nullcontext():
                terms = self.batch_loss(step, batch_number)
                kept = sum(value for name, value in terms.items() if name != "erase")
                self.accelerator.backward((terms["erase"] + self.args.retain_weight * kept) / self.batches_a_step)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / self.batches_a_step
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.weights.student.values(), self.args.max_grad_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.weights.update_ema()
        means = {name: self.accelerator.reduce(value, "mean").item() for name, value in totals.items()}
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"step {step + 1}: the loss is {means}; lower --learning_rate. Nothing was saved")
        return means

    # --- the whole run -----------------------------------------------------------------------------------------------

    def run(self, progress_bar: bool = True, callback: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Trains to the end and leaves the published weights in the denoiser.

        A first Ctrl-C or SIGTERM saves a checkpoint after the current step and ends the program with code 130.

        Args:
            progress_bar (`bool`, defaults to `True`): Whether to show one.
            callback (`Callable`, *optional*): Called after each step with its number, from 1, and what was measured.
        """
        args, last = self.args, self.args.max_train_steps
        first = 0
        if checkpoint := args.find_checkpoint():
            self.accelerator.load_state(str(checkpoint))
            first = checkpoint_step(checkpoint)
        self.erasing.prepare()
        self.retaining.prepare()
        log = RunLog(self.accelerator, args, first)
        hidden = not (progress_bar and self.accelerator.is_main_process)
        bar = tqdm(range(first, last), self.objective.name.upper(), last, initial=first, disable=hidden)
        every = max(1, last // 20)
        shown = {}
        with _StopRequest(listens=args.output_dir is not None) as stop:
            for step in bar:
                measured = self.train_step(step)
                done = step + 1
                rate = {"learning_rate": self.lr_scheduler.get_last_lr()[0]}
                if done % every == 0 or done == last:
                    shown = self.watch.measure(self.objective.publishes)
                    by_concept = self.concept_losses.take(self.accelerator)
                    log.write(done, {**measured, **shown, "by_concept": by_concept}, rate, self.predictor.forwards)
                    self._warn_of_collapse(done, shown)
                else:
                    log.follow(done, {**measured, **rate})
                measured |= shown
                bar.set_postfix({name: f"{value:.3g}" for name, value in measured.items()}, refresh=False)
                if callback is not None:
                    callback(done, measured)
                self._save_if_due(done, stop, bar)
        log.close()
        with torch.no_grad():
            for name, value in self.weights.values(self.objective.publishes).items():
                self.weights.student[name].copy_(value)

    def _warn_of_collapse(self, step: int, shown: dict[str, float]) -> None:
        if shown.get("drift", 0) > DRIFT_WARNING and not self._warned and self.accelerator.is_main_process:
            self._warned = True
            logger.warning(
                "step %d: prompts that should stay have moved %.0f %% of what they say; the model may be collapsing: "
                "lower --learning_rate, or give --retain_prompts",
                step,
                100 * shown["drift"],
            )

    def _save_if_due(self, step: int, stop: "_StopRequest", bar: tqdm) -> None:
        args = self.args
        if args.output_dir is None or step >= args.max_train_steps:
            return
        stopping = self._anyone(stop.requested)
        if stopping or (args.checkpointing_steps and step % args.checkpointing_steps == 0):
            saved = save_checkpoint(self.accelerator, Path(args.output_dir), step, args.checkpoints_total_limit)
            if stopping:
                bar.close()
                if self.accelerator.is_main_process:
                    print(f"stopped; continue with --resume_from_checkpoint {saved}")
                raise SystemExit(130)

    def _anyone(self, wish: bool) -> bool:
        """Whether any process has the wish; all must act alike, or they would wait for each other forever."""
        return self.accelerator.reduce(torch.tensor(float(wish), device=self.accelerator.device), "sum").item() > 0


class RunIdentity:
    """What a checkpoint must share with the run that continues it."""

    file_name = "run.json"
    # What is written, where and how often, changes no step.
    free = {"output_dir", "save", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
            "watch_prompts", "validation_prompts", "num_validation_images", "validation_steps", "report_to",
            "logging_dir", "dry_run", "preset", "pretrained_model_name_or_path", "train_batch_size",
            "gradient_accumulation_steps", "gradient_checkpointing", "allow_tf32"}  # fmt: skip

    def __init__(self, args: ErasureArguments, weights: TrainedWeights, samples_a_step: int):
        self.state = {name: value for name, value in args.recorded.items() if name not in self.free}
        self.state["samples_a_step"] = samples_a_step
        # The frozen weights are the base model's: their sums tell another base model at once.
        sums = [float(value.double().sum()) for value in weights.frozen.values()]
        self.state["base_weights"] = hashlib.sha256(repr(sums).encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        write_text(Path(folder) / self.file_name, json.dumps(self.state, indent=2))

    def check(self, folder: str | Path) -> None:
        """Raises a `ValueError` if the checkpoint in a folder is of another run."""
        path = Path(folder) / self.file_name
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint {folder}: holds no {self.file_name}; it is of another program")
        state = json.loads(path.read_text(encoding="utf-8"))
        if different := sorted(name for name in self.state if state.get(name) != self.state[name]):
            told = ", ".join(f"{name} {state.get(name)} there, {self.state[name]} here" for name in different)
            raise ValueError(f"resume_from_checkpoint: the checkpoint is of another run: {told[:400]}")


class _StopRequest:
    """Turns the first SIGINT or SIGTERM into a wish that the loop grants between two steps; a second one ends it.

    Without a folder to save to it listens to nothing, nor in a thread, where Python has no signals.
    """

    def __init__(self, listens: bool):
        self.requested = False
        self._listens = listens and threading.current_thread() is threading.main_thread()

    def __enter__(self):
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM) if self._listens else ():
            self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self.requested = True
        signal.signal(number, self._before[number])

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _adam_class(use_8bit: bool) -> type[torch.optim.Optimizer]:
    if not use_8bit:
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit
