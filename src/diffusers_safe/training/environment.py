"""What a training changes around it, and gives back: the accelerator, random generators, the parts of a pipeline."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..messages import num_launched
from .job import JobOptions, TrainingOptions


class EnvironmentFault(ValueError):
    """Options that these processes or this device cannot honour, found before work starts."""

    exit_code = 2


def make_accelerator(options: JobOptions) -> Accelerator:
    """Devices, processes and trackers, as `accelerate launch` and the options say.

    Raises:
        `ValueError`: If the device does not have the precision.
    """
    project = log_with = None
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if isinstance(options, TrainingOptions):
        precision = options.run.mixed_precision or precision
        if options.output.output_dir is not None:
            project = ProjectConfiguration(options.output.output_dir, options.tracker_dir)
        tracker = options.checkpoints.report_to
        log_with = None if tracker == "none" else tracker
        if options.run.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier call, which asked for another
    accelerator = Accelerator(mixed_precision=precision, log_with=log_with, project_config=project)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise EnvironmentFault(
            "mixed_precision fp16: gradients need a GPU's loss scaling; allowed on a CPU are no, bf16"
        )
    launched = num_launched()
    if launched != accelerator.num_processes:
        raise EnvironmentFault(
            f"{launched} processes were launched, but each would train alone: set ACCELERATE_USE_CPU=true where "
            "there is no GPU for each"
        )
    return accelerator


def restore_forward(denoiser: nn.Module, forward: Callable | None) -> None:
    """Takes off what mixed precision wraps around `forward`. accelerate's own way takes off one decorator too many,
    diffusers' own, that scales LoRAs."""
    vars(denoiser).pop("_original_forward", None)
    vars(denoiser).pop("forward", None)
    if forward is not None:
        denoiser.forward = forward


@contextmanager
def isolated_from_caller() -> Iterator[None]:
    """Gradients are on inside, and seeds that are set there do not reach the caller: the random generators of Python,
    NumPy and torch, on the CPU and on CUDA devices, continue afterwards where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def in_float32(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Trained weights are float32, and images need all parts alike. Afterwards every part is as it was."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    homes = [(part, part.device, part.dtype, part.training) for part in parts]
    plain = [part for part in parts if isinstance(part, ModelMixin) and not part.is_gradient_checkpointing]
    trainable = {parameter for part in parts for parameter in part.parameters() if parameter.requires_grad}
    try:
        for part in parts:
            if part.dtype != torch.float32:
                nn.Module.to(part, torch.float32)  # diffusers' own warns
        yield
    finally:
        for part, device, dtype, training in homes:
            part.train(training).to(device)
            if part.dtype != dtype:
                nn.Module.to(part, dtype)
            for parameter in part.parameters():
                parameter.requires_grad_(parameter in trainable)
        for part in plain:
            part.disable_gradient_checkpointing()
