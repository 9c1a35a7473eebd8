"""From a pipeline to an erased one: the same way for every method, from Python and from the command line."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..arguments import check_values, choose, exit_with_error, suggested, typed
from ..families import StoredModel, load_pipeline, make_family
from ..hub import check_push, push_or_exit, push_result
from ..output_folders import record_written
from ..provenance import Provenance, fingerprint, stored_path
from ..report.grid import GRID_NAME, save_grid
from ..training.output import save_result
from ..training.samples import Samples, Validation
from .arguments import METHODS, ErasureArguments, parse_arguments, preset_options
from .checks import check_run
from .loop import ErasureLoop
from .plan import make_plan


Callback = Callable[[int, dict[str, float]], None]


@typed
def erase(
    pipeline: DiffusionPipeline | str,
    concepts: list[str],
    method: str = "sdd",
    *,
    output_dir: str | None = None,
    progress_bar: bool = True,
    callback: Callback | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """Erases concepts from a pipeline, in place: what the training scripts do, in one call.

        pipeline = erase("CompVis/stable-diffusion-v1-4", ["Van Gogh"], method="esd", preset="esd-2025")

    (The settings are those of github.com/rohitgandikota/erasing, 2025. Not run here.)

    Nothing else of the caller's changes: not the state of random generators, and, where the call raises, not the
    pipeline either.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`] or `str`): A loaded pipeline of a supported family, whose denoiser
            is changed, or a folder or Hub id.
        concepts (`list[str]` or `str`): What to erase, at least one name; a text is one concept.
        method (`str`, defaults to `"sdd"`): `"sdd"` or `"esd"`.
        output_dir (`str`, *optional*): Where to save the result, erasure.json, a log and checkpoints; without it
            nothing is written.
        progress_bar (`bool`, defaults to `True`): Whether to show progress and time left.
        callback (`Callable`, *optional*): Called after every step with its number, from 1, and what was measured.
        options: Any argument of the method's script (`python train_esd.py --help`), such as `max_train_steps=200`.

    Returns:
        [`~diffusers.DiffusionPipeline`]: The pipeline, on the device and in the dtype that it had; with `rank`, the
        LoRA is switched on in it (`diffusers_safe.weights.lora.fused` gives a plain one).

    Raises:
        `ValueError`: If the method, an option or a value is unknown or out of its range, or the family of the pipeline
            is not supported.
        `FloatingPointError`: If the loss is not finite any more.
        [`~diffusers_safe.hub.PushError`]: If it could not be published; the result is complete on disk.
    """
    pipeline = os.fspath(pipeline) if isinstance(pipeline, os.PathLike) else pipeline
    args = _arguments(pipeline, concepts, method, output_dir, options)
    with _random_states_kept():
        accelerator = make_accelerator(args)
        if isinstance(pipeline, str):
            check_run(args, StoredModel(pipeline, args.resolution, **args.index_arguments))
            args.check_files()
        else:
            check_run(args, make_family(pipeline, args.resolution))
        if output_dir is not None:
            args.check_output()
        with args.claimed_output():
            if isinstance(pipeline, str):
                pipeline = load_pipeline(pipeline, **args.hub_arguments)
            train(accelerator, pipeline, args, progress_bar, callback)
    if args.push_to_hub and accelerator.is_main_process:
        push_result(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private)
    return pipeline


def _arguments(
    pipeline: DiffusionPipeline | str,
    concepts: list[str],
    method: str,
    output_dir: str | None,
    options: dict[str, Any],
) -> ErasureArguments:
    method = choose("method", method, METHODS)
    kind = METHODS[method]
    own = ("pretrained_model_name_or_path", "concepts", "output_dir")  # which have a parameter
    names = [item.name for item in fields(kind) if item.name not in own]
    if unknown := [suggested(name, names, "") for name in sorted(options.keys() - set(names))]:
        raise ValueError(f"{', '.join(unknown)}: no option of method '{method}'; see train_{method}.py --help")
    presets = preset_options(kind)
    options = check_values(kind, options)
    name = pipeline if isinstance(pipeline, str) else pipeline.config.get("_name_or_path") or "a pipeline in memory"
    known = {"pretrained_model_name_or_path": name, "concepts": concepts, "output_dir": output_dir}
    args = kind(**known, **{**presets.get(options.get("preset", "paper"), {}), **options})
    if args.dry_run:
        raise ValueError(f"dry_run: only for the script, train_{method}.py")
    for name in ("resume_from_checkpoint", "report_to"):
        if output_dir is None and options.get(name, "none") != "none":
            raise ValueError(f"{name} {options[name]}: needs an output_dir")
    if args.push_to_hub:
        check_push(args.hub_model_id, args.hub_token)
    return args


@exit_with_error()
def run_command(kind: type[ErasureArguments], description: str, argv: list[str] | None = None) -> None:
    """What a training script does with its command line."""
    args = parse_arguments(kind, description, argv)
    with exit_with_error():
        if args.dry_run:
            if os.environ.get("RANK", "0") == "0":
                print(make_plan(args, int(os.environ.get("WORLD_SIZE", "1"))))
            return
        with args.claimed_output():
            accelerator = make_accelerator(args)
            pipeline = load_pipeline(args.pretrained_model_name_or_path, **args.hub_arguments)
            train(accelerator, pipeline, args)
        if accelerator.is_main_process:
            print(f"erased {', '.join(args.concepts)}; the result is in {args.output_dir}")
            if args.push_to_hub:  # the other processes need not wait for the network
                push_or_exit(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private)


def make_accelerator(args: ErasureArguments) -> Accelerator:
    """Devices, processes and trackers, as `accelerate launch` and the arguments say.

    Raises:
        `ValueError`: If the device does not have the precision.
    """
    project = None
    if args.output_dir is not None:
        project = ProjectConfiguration(args.output_dir, args.tracker_dir)
    log_with = None if args.report_to == "none" else args.report_to
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier call, which asked for another
    accelerator = Accelerator(mixed_precision=precision, log_with=log_with, project_config=project)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16: gradients need a GPU's loss scaling; allowed on a CPU are no, bf16")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each would train by itself: set ACCELERATE_USE_CPU=true where "
            "there is no GPU for each"
        )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def train(
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    args: ErasureArguments,
    progress_bar: bool = True,
    callback: Callback | None = None,
) -> None:
    """Erases from a loaded pipeline; where there is an output folder, writes the result, as it is to be published.

    If the run is stopped or fails, the pipeline is as it was.
    """
    set_seed(args.seed)
    with _in_float32(pipeline):
        family = make_family(pipeline, args.resolution)
        objective = args.make_objective()
        provenance = Provenance(
            base_model=stored_path(args.pretrained_model_name_or_path),
            base_fingerprint=fingerprint(family.denoiser),
            concepts=args.concepts,
            method=objective.name,
            train_method=args.train_method,
            arguments={
                **args.recorded,
                "num_processes": accelerator.num_processes,
                "mixed_precision": accelerator.mixed_precision,
            },
            revision=args.revision,
        )
        own_forward = vars(family.denoiser).get("forward")
        loop = ErasureLoop(accelerator, family, objective, args, args.ema_decay)
        samples = Samples.of_run(pipeline, loop.weights, args)
        try:
            loop.run(progress_bar, _with_validation(callback, samples, loop, args))
        except BaseException:
            loop.weights.undo()
            raise
        finally:
            restore_forward(family.denoiser, own_forward)
        if args.output_dir is not None and accelerator.is_main_process:
            save_result(pipeline, loop.weights, provenance, args.output_dir, args.save)
            if args.push_to_hub:
                if samples.last is None:  # else it is what validation has drawn after the last step
                    pipeline.to(accelerator.device)
                    samples.draw()
                save_grid(samples.last, args.output_dir)
                record_written(args.output_dir, GRID_NAME)
        accelerator.wait_for_everyone()


def restore_forward(denoiser: nn.Module, forward: Callable | None) -> None:
    """Takes off what mixed precision wraps around a forward. accelerate's own way takes off one decorator too many,
    diffusers' own, that scales LoRAs."""
    vars(denoiser).pop("_original_forward", None)
    vars(denoiser).pop("forward", None)
    if forward is not None:
        denoiser.forward = forward


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Seeds that are set inside are not the caller's: the generators of Python, NumPy and torch, on the CPU and on
    CUDA devices, go on afterwards where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _in_float32(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Trained weights are float32, and pictures need all parts alike. Afterwards every part is as it was."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    homes = [(part, part.device, part.dtype, part.training) for part in parts]
    plain = [part for part in parts if isinstance(part, ModelMixin) and not part.is_gradient_checkpointing]
    trainable = {parameter for part in parts for parameter in part.parameters() if parameter.requires_grad}
    try:
        for part in parts:
            if part.dtype != torch.float32:
                part.to(torch.float32)
        yield
    finally:
        for part, device, dtype, training in homes:
            part.train(training).to(device)
            if part.dtype != dtype:
                part.to(dtype)
            for parameter in part.parameters():
                parameter.requires_grad_(parameter in trainable)
        for part in plain:
            part.disable_gradient_checkpointing()


def _with_validation(
    callback: Callback | None,
    samples: Samples,
    loop: ErasureLoop,
    args: ErasureArguments,
) -> Callback | None:
    """A callback that also draws the validation prompts, where there are any."""
    if not args.validation_prompts:
        return callback
    validation = Validation(loop.accelerator, samples, args, loop.objective.output_weights)

    def after_step(step: int, measured: dict[str, float]) -> None:
        validation.after_step(step)
        if callback is not None:
            callback(step, measured)

    return after_step
