"""What a training would do, from the model's configs alone, without its weights: `--dry_run`."""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import nn

from ..diffusion.trajectories import Trajectories
from ..families import TRAIN_METHODS, StoredModel
from ..weights.trained import TrainedWeights
from .job import TrainingOptions
from .loop import peak_learning_rate
from .options import RunOptions, SamplingOptions


GIB = 2**30


@dataclass
class Plan:
    """Attributes:
    options (`TrainingOptions`): Of the run.
    goal (`tuple[str, str]`): What is done, and to what.
    selected, total (`tuple[int, int]`): Tensors and parameters: those that train, and all.
    forwards (`dict[str, float]`): Mean number of denoisers' forward passes, counted in samples, for one training
        sample, by what they are for.
    backwards (`int`): The number of backward passes.
    memory (`dict[str, float]`): Bytes on the device, by what they are for; all in float32.
    flops (`float`): Of one training sample, forward and backward passes.
    num_processes (`int`): As launched.
    """

    options: TrainingOptions
    goal: tuple[str, str]
    selected: tuple[int, int]
    total: tuple[int, int]
    forwards: dict[str, float]
    backwards: int
    memory: dict[str, float]
    flops: float
    num_processes: int

    @property
    def num_samples(self) -> int:
        return self.options.run.num_samples * self.num_processes

    def __str__(self) -> str:
        options, per_sample = self.options, sum(self.forwards.values())
        run, weights = options.run, options.weights
        method = TRAIN_METHODS[weights.train_method].description
        if weights.rank is not None:
            method = f"a LoRA of rank {weights.rank} on {method}"
        learning_rate = peak_learning_rate(options.optimizer, run, self.num_processes)
        petaflops = self.flops * self.num_samples / 1e15
        rows = {
            self.goal[0]: self.goal[1],
            "from": options.model.pretrained_model_name_or_path,
            "train": f"{weights.train_method} ({method}): {self.selected[0]} of {self.total[0]} tensors, "
            f"{self.selected[1] / 1e6:,.2f} of {self.total[1] / 1e6:,.2f} M parameters",
            "steps": f"{run.max_train_steps:,}, {_counted(self.num_samples // run.max_train_steps, 'sample')} each "
            f"({_counted(self.num_processes, 'process', 'es')} x batch {run.train_batch_size} x accumulation "
            f"{run.gradient_accumulation_steps}), learning rate {learning_rate:g}, {options.optimizer.lr_scheduler}",
            "forward passes": f"{per_sample:.1f} per sample ({_parts(self.forwards, '{:.1f}')}), "
            f"{per_sample * self.num_samples:,.0f} in total; backward passes: {self.backwards} per sample",
            "arithmetic": f"{petaflops:,.3g} PFLOP: {format_duration(petaflops * 100)} at 10 TFLOP/s, "
            f"{format_duration(petaflops * 10)} at 100",
            "memory": f"{sum(self.memory.values()) / GIB:.2f} GiB per device "
            f"({_parts(self.memory, '{:.2f}', 1 / GIB)}), computed for float32",
            "result": f"{options.output.output_dir} ({options.output.save})",
        }
        return "\n".join(f"{name:14} {text}" for name, text in rows.items()) + "\nnothing was trained or written"


def blank_batch(denoiser: ModelMixin, model: StoredModel, run: RunOptions) -> dict:
    """A batch of the run, without values."""
    shape = (run.train_batch_size, *model.latent_shape)
    return model.family.blank_inputs(denoiser, shape, model.tokenizers[0].model_max_length)


def training_memory(modules: set[nn.Module], weights: TrainedWeights, use_8bit_adam: bool) -> dict[str, float]:
    """Bytes by what they are for, without activations, where these modules are on the device."""
    resident = [parameter for module in modules for parameter in module.parameters()]  # a LoRA's among them
    own = set(map(id, resident))
    copies = [
        value.numel()
        for side in (weights.frozen or {}, weights.ema or {})
        for value in side.values()
        if id(value) not in own
    ]
    trained = sum(map(torch.numel, weights.student.values()))
    return {
        "model": 4 * sum(parameter.numel() for parameter in resident),
        "copies and gradients": 4 * (sum(copies) + trained),
        "Adam": (2 if use_8bit_adam else 8) * trained,
    }


def trajectory_forwards(sampling: SamplingOptions, trajectories: Trajectories) -> float:
    """Mean number of forward passes of one trajectory, which runs to its last stop."""
    choices = trajectories.stop_choices(sampling.sampling_fraction, sampling.latents_per_trajectory)
    return sum(map(max, choices)) / len(choices) * trajectories.forwards_per_step


def _parts(values: dict[str, float], pattern: str, factor: float = 1) -> str:
    return ", ".join(f"{name} {pattern.format(factor * value)}" for name, value in values.items())


def _counted(count: int, unit: str, plural: str = "s") -> str:
    return f"{count} {unit}{plural if count != 1 else ''}"


def format_duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
