"""The loop of every training: terms of the loss, step, EMA, log, checkpoint, stop."""

import hashlib
import json
import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from ..progress import Progress, ProgressCallback
from ..provenance import write_text
from ..weights.lora import LoRAWeights
from ..weights.trained import TrainedWeights, select_parameters
from .checkpoints import RUN_FILE, check_same_run, checkpoint_step, save_checkpoint
from .job import TrainingOptions
from .options import OptimizerOptions, RunOptions, WeightOptions
from .run_log import RunLog


def make_weights(
    module: nn.Module,
    options: WeightOptions,
    seed: int,
    ema_decay: float | None = None,
    keeps_frozen: bool = True,
) -> TrainedWeights:
    """What a run trains in a module: the selected weights themselves, or a LoRA on them.

    Args:
        module (`nn.Module`): A denoiser of a supported family, or [`TextEncoders`].
        options (`WeightOptions`): The train method, and the LoRA's rank and alpha.
        seed (`int`): Of a LoRA's initial values.
        ema_decay (`float`, *optional*): Of the average, if there is one.
        keeps_frozen (`bool`, defaults to `True`): Whether the initial values are kept; a LoRA always has them.
    """
    names = select_parameters(module, options.train_method)
    if options.rank is None:
        return TrainedWeights(module, names, ema_decay, keeps_frozen)
    return LoRAWeights(module, names, ema_decay, rank=options.rank, alpha=options.lora_alpha, seed=seed)


def peak_learning_rate(optimizer: OptimizerOptions, run: RunOptions, num_processes: int) -> float:
    """`learning_rate`, with `scale_lr` times the samples of a step."""
    samples = run.train_batch_size * run.gradient_accumulation_steps * num_processes
    return optimizer.learning_rate * (samples if optimizer.scale_lr else 1)


class TrainingLoop(ABC):
    """Trains a module; `run` leaves the published weights in it. A subclass says what is learned.

    Args:
        accelerator (`Accelerator`): Devices, processes, mixed precision.
        module (`nn.Module`): A denoiser or [`TextEncoders`], trained in place.
        options (`TrainingOptions`): Everything else.

    Attributes:
        name (`str`): Shown at the progress bar.
        output_weights (`str`): Whose weights are the result: `"student"` or `"ema"`.
        term_weights (`dict[str, float]`): How much each term of the loss counts.
        forwards (`int`): How many samples denoisers have seen so far in this process.
        student (`nn.Module`): The module as it is trained, possibly wrapped for several processes.
        steps (`int`): How many were trained, once the run is over.
        last_means (`dict[str, float]`): The terms of the loss, means of the last twentieth of the run, as far as it
            was not an earlier one's.
        last_measured (`dict[str, float]`): The numbers of `measure` at the last row of the log.
    """

    name: str
    output_weights: str = "student"
    term_weights: dict[str, float]
    forwards: int

    def __init__(self, accelerator: Accelerator, module: nn.Module, options: TrainingOptions):
        self.accelerator, self.options = accelerator, options
        run, optimizer = options.run, options.optimizer
        module = module.to(accelerator.device)
        module.train()
        if run.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        self.weights = make_weights(
            module, options.weights, options.output.seed, options.ema_decay, options.KEEPS_FROZEN
        )
        self.batches_a_step = run.gradient_accumulation_steps
        self.samples_a_step = run.train_batch_size * self.batches_a_step * accelerator.num_processes
        self.optimizer = _adam_class(optimizer.use_8bit_adam)(
            self.weights.student.values(),
            lr=peak_learning_rate(optimizer, run, accelerator.num_processes),
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            weight_decay=optimizer.adam_weight_decay,
            eps=optimizer.adam_epsilon,
        )
        self.lr_scheduler = get_scheduler(
            optimizer.lr_scheduler,
            self.optimizer,
            num_warmup_steps=optimizer.lr_warmup_steps,
            num_training_steps=run.max_train_steps,
        )
        self.last_means: dict[str, float] = {}
        self.last_measured: dict[str, float] = {}
        # The loop accumulates itself; what `accelerate launch` set would divide gradients a second time.
        accelerator.gradient_accumulation_steps = 1
        self.student, self.optimizer = accelerator.prepare(module, self.optimizer)

    # --- what a subclass says ----------------------------------------------------------------------------------------

    @abstractmethod
    def batch_terms(self, step: int, slots: range) -> dict[str, torch.Tensor]:
        """The terms of the loss of one batch of this process, each a mean over its samples.

        Args:
            step (`int`): Counted from 0.
            slots (`range`): The places of the samples among the `samples_a_step` of all processes.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Does what is done once, ahead of all steps; a checkpoint has been loaded by then."""

    def most_ema_decay(self, step: int) -> float:
        """The decay that the average has at most after a step, counted from 0."""
        return 1.0

    def measure(self, step: int) -> dict:
        """Measures what the log reports in addition to the loss, 20 times per run; called on every process."""
        return {}

    def is_reached(self) -> bool:
        """Whether the last measurement was good enough to end the run before its last step."""
        return False

    # --- one step ----------------------------------------------------------------------------------------------------

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns the mean of each term of the loss."""
        totals: dict[str, torch.Tensor] = {}
        size = self.options.run.train_batch_size
        for batch_number in range(self.batches_a_step):
            last = batch_number == self.batches_a_step - 1
            first = (batch_number * self.accelerator.num_processes + self.accelerator.process_index) * size
            with self.accelerator.no_sync(self.student) if not last else nullcontext():
                terms = self.batch_terms(step, range(first, first + size))
                loss = sum(self.term_weights[name] * value for name, value in terms.items())
                self.accelerator.backward(loss / self.batches_a_step)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / self.batches_a_step
        if (most := self.options.optimizer.max_grad_norm) > 0:
            self.accelerator.clip_grad_norm_(self.weights.student.values(), most)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.weights.update_ema(self.most_ema_decay(step))
        means = {name: self.accelerator.reduce(value, "mean").item() for name, value in totals.items()}
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"step {step + 1}: the loss is {means}; lower --learning_rate. Nothing was saved")
        return means

    # --- the whole run -----------------------------------------------------------------------------------------------

    def make_resumable(self, *parts, **facts: str) -> None:
        """Makes these, which have a `state_dict`, a part of every checkpoint, with all that the loop itself knows.

        `facts` are what a run that continues must share, in addition to its options and the base model.
        """
        identity = RunIdentity(self.options.identity, self.weights, self.samples_a_step, facts)

        # The base model is on disk already: a checkpoint holds the trained weights only.
        def before_saving(models, weights, folder):
            weights.clear()
            if self.accelerator.is_main_process:
                identity.save(folder)

        # An optimizer of other weights would be refused, too, but with a message that does not help.
        def before_loading(models, folder):
            models.clear()
            identity.check(folder)

        self.accelerator.register_save_state_pre_hook(before_saving)
        self.accelerator.register_load_state_pre_hook(before_loading)
        self.accelerator.register_for_checkpointing(self.weights, self.lr_scheduler, *parts)

    def run(self, progress_bar: bool = True, callback: ProgressCallback | None = None) -> None:
        """Trains to the end and leaves the published weights in the denoiser.

        A first Ctrl-C or SIGTERM saves a checkpoint after the current step and ends the program with code 130 or
        143.

        Args:
            progress_bar (`bool`, defaults to `True`): Whether to show one.
            callback (`Callable[[Progress], None]`, *optional*): Called after each step; what it raises ends the run.
        """
        first, last = 0, self.options.run.max_train_steps
        if checkpoint := self.options.find_checkpoint():
            self.accelerator.load_state(str(checkpoint))
            first = checkpoint_step(checkpoint)
        self.prepare()
        log = RunLog(self.accelerator, self.options, first)
        hidden = not (progress_bar and self.accelerator.is_main_process)
        bar = tqdm(desc=self.name, total=last, initial=first, disable=hidden)
        every = max(1, last // 20)
        shown, recent = {}, deque(maxlen=every)
        started = time.monotonic()
        with _StopRequest(listens=self.options.output.output_dir is not None) as stop, bar:
            for step in range(first, last):
                measured = self.train_step(step)
                recent.append(measured)
                done = step + 1
                rate = {"learning_rate": self.lr_scheduler.get_last_lr()[0]}
                if done % every == 0 or done == last:
                    extra = self.measure(done)
                    shown = {name: value for name, value in extra.items() if isinstance(value, float)}
                    self.last_measured = shown
                    self.last_means = {name: sum(row[name] for row in recent) / len(recent) for name in measured}
                    log.write(done, {**measured, **extra}, rate, self.forwards)
                else:
                    log.follow(done, {**measured, **rate})
                measured |= shown
                bar.set_postfix({name: f"{value:.3g}" for name, value in measured.items()}, refresh=False)
                if done % every == 0 and self._anyone(self.is_reached()):
                    bar.total = last = done
                bar.update()
                if callback is not None:
                    left = (time.monotonic() - started) / (done - first) * (last - done)
                    callback(Progress(self.name, done, last, left, measured))
                if done == last:
                    break
                self._save_if_due(done, stop, bar)
        log.close()
        self.steps = last
        with torch.no_grad():
            for name, value in self.weights.values(self.output_weights).items():
                self.weights.student[name].copy_(value)

    def _save_if_due(self, step: int, stop: "_StopRequest", bar: tqdm) -> None:
        folder, checkpoints = self.options.output.output_dir, self.options.checkpoints
        if folder is None:
            return
        stopping, every = self._anyone(bool(stop.signal)), checkpoints.checkpointing_steps
        if stopping or (every and step % every == 0):
            limit = checkpoints.checkpoints_total_limit
            saved = save_checkpoint(self.accelerator, Path(folder), step, limit)
            if stopping:
                bar.close()
                if self.accelerator.is_main_process:
                    print(f"stopped; continue with --resume_from_checkpoint {saved}")
                raise SystemExit(128 + (stop.signal or signal.SIGINT))  # 130 where another process was asked

    def _anyone(self, wish: bool) -> bool:
        """Whether any process has the wish; all must act alike, or they would wait for each other forever."""
        return self.accelerator.reduce(torch.tensor(float(wish), device=self.accelerator.device), "sum").item() > 0


class RunIdentity:
    """What a checkpoint must share with the run that continues it."""

    file_name = RUN_FILE

    def __init__(
        self,
        identity: dict,
        weights: TrainedWeights,
        samples_a_step: int,
        facts: dict[str, str],
    ):
        self.state = {**identity, "samples_a_step": samples_a_step, **facts}
        # What the run starts from: its sums tell another base model at once.
        sums = [value.detach().double().sum().item() for value in (weights.frozen or weights.student).values()]
        self.state["base_weights"] = hashlib.sha256(repr(sums).encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        write_text(Path(folder) / self.file_name, json.dumps(self.state, indent=2))

    def check(self, folder: str | Path) -> None:
        """Raises a `ValueError` if the checkpoint in a folder is of another run."""
        check_same_run(folder, self.state)


class _StopRequest:
    """Turns the first SIGINT or SIGTERM into a wish that the loop grants between two steps; a second one ends it.

    Without a folder to save to it listens to nothing, nor in a thread, where Python has no signals.
    """

    def __init__(self, listens: bool):
        self.signal = 0
        self._listens = listens and threading.current_thread() is threading.main_thread()

    def __enter__(self):
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM) if self._listens else ():
            self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self.signal = number
        signal.signal(number, self._before[number])

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _adam_class(use_8bit: bool) -> type[torch.optim.Optimizer]:
    if not use_8bit:
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit
