"""A stage of the recipe: trains one module with checkpoints, so that it can be stopped and moved to other machines."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from ...files import disk_errors, write_text
from ...output_folders import claimed
from ...training.checkpoints import checkpoint_step, list_checkpoints, save_checkpoint


Batch = dict[str, torch.Tensor]


@dataclass
class Round:
    """A part of a stage.

    Args:
        steps (`int`): Number of optimizer steps.
        batch_size (`int`): Number of samples per step.
        make_batch (`Callable`): Function `(rng, size) -> dict` that returns the arguments of the module. It must
            depend on the generator only.
        decays (`bool`, defaults to `True`): Whether the learning rate decays to zero.
    """

    steps: int
    batch_size: int
    make_batch: Callable[[np.random.Generator, int], Batch]
    decays: bool = True


@dataclass
class Stage:
    """A trainable module and its training settings.

    Args:
        name (`str`): Name of the folder; also part of the seed of its batches.
        module (`nn.Module`): Its forward takes the output of `make_batch` and returns the loss.
        rounds (`list[Round]`): Parts of the training. Each starts from the averaged weights of the previous one with a
            new optimizer. Its result is a single small file, so that a long training can continue on another machine.
        learning_rate (`float`): Peak learning rate of AdamW.
        ema_decay (`float`, defaults to 0.999): Decay of the EMA of the weights, which is the result.
        mixed_precision (`str`, defaults to `"no"`): `"bf16"` if the matrices are large enough to benefit from it. It
            is only used on devices with bfloat16 instructions.
        compiled (`bool`, defaults to `False`): Compile the module with `torch.compile`.
        identity (`dict`, *optional*): Other values that the result depends on, such as a fingerprint of the data. A
            run with other values is not continued.
    """

    name: str
    module: nn.Module
    rounds: list[Round]
    learning_rate: float
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    compiled: bool = False
    identity: dict = field(default_factory=dict)


def learning_rate_factor(step: int, steps: int, decays: bool = True, warmup: int = 200, decay: float = 0.4) -> float:
    """Warm-up, then constant; if it `decays`, linearly to zero over the last share `decay` of the steps."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (steps * decay)) if decays else 1.0)


def train_stage(stage: Stage, output_dir: str | Path, seed: int = 0, checkpoint_minutes: float = 5.0) -> nn.Module:
    """Trains a stage: loads its newest finished round and continues from the newest checkpoint of the next one.

    Each batch is a function of (seed, name, round, step), so a stopped run continues with the same batches.

    Returns:
        `nn.Module`: `stage.module` with its averaged weights, on the CPU, rounded to float16.

    Raises:
        `ValueError`: If the folder contains a run with other settings, another process uses it, or there are several
            processes.
    """
    folder = Path(output_dir) / stage.name
    with claimed(folder):
        numbers = range(1, len(stage.rounds) + 1)
        finished = [number for number in numbers if (folder / f"round-{number}" / "ema.pt").exists()]
        for number in numbers[max(finished, default=1) - 1 :]:  # the newest finished round is only read
            _train_round(stage, folder / f"round-{number}", number, seed, checkpoint_minutes)
    return stage.module


def _train_round(stage: Stage, folder: Path, number: int, seed: int, checkpoint_minutes: float) -> None:
    this = stage.rounds[number - 1]
    steps = this.steps
    _check_same_run(folder, stage, this, seed)
    finished = folder / "ema.pt"
    if finished.exists():
        stage.module.load_state_dict(torch.load(finished, weights_only=True))
        return

    AcceleratorState._reset_state()  # stages differ in precision
    accelerator = Accelerator(mixed_precision=stage.mixed_precision if computes_in_bfloat16() else "no")
    if accelerator.num_processes > 1:
        raise ValueError(f"num_processes {accelerator.num_processes}: the recipe runs in one process")
    module = stage.module
    if accelerator.device.type == "cpu":
        module = module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    ema = EMAModel(module.parameters(), decay=stage.ema_decay, use_ema_warmup=True, power=0.8, foreach=True)
    prepared, optimizer = accelerator.prepare(module, optimizer)
    if stage.compiled:
        prepared.compile(dynamic=False)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    first = 0
    if checkpoints := list_checkpoints(folder):
        first = checkpoint_step(checkpoints[-1])
        if first > steps:
            raise ValueError(
                f"{folder}: its newest checkpoint is of step {first}, but the round has only {steps} steps"
            )
        accelerator.load_state(str(checkpoints[-1]))

    name = stage.name if len(stage.rounds) == 1 else f"{stage.name}, round {number} of {len(stage.rounds)}"
    bar = tqdm(range(first, steps), name, steps, initial=first, mininterval=10)
    saved_at, shown = time.monotonic(), None
    for step in bar:
        batch = this.make_batch(np.random.default_rng([seed, *stage.name.encode(), number, step]), this.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * learning_rate_factor(step, steps, this.decays)
        loss = prepared(**{key: value.to(accelerator.device) for key, value in batch.items()})
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(module.parameters())
        if step % 20 == 0:
            value = loss.item()
            shown = value if shown is None else 0.95 * shown + 0.05 * value
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
        if time.monotonic() - saved_at > 60 * checkpoint_minutes and step + 1 < steps:
            save_checkpoint(accelerator, folder, step + 1, limit=2)
            saved_at = time.monotonic()

    ema.copy_to(module.parameters())
    module = module.to("cpu", memory_format=torch.contiguous_format)
    result = {key: value.half() if value.is_floating_point() else value for key, value in module.state_dict().items()}
    module.load_state_dict(result)
    partial = finished.with_suffix(".partial")
    with disk_errors(finished):
        torch.save(result, partial)
    partial.rename(finished)
    accelerator.free_memory()


def computes_in_bfloat16() -> bool:
    """Whether this machine has a GPU, or a CPU with bfloat16 instructions."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _check_same_run(folder: Path, stage: Stage, this: Round, seed: int) -> None:
    settings = {
        "seed": seed,
        "steps": this.steps if this.decays else None,  # only if the learning rate depends on them
        "learning_rate": stage.learning_rate,
        "batch_size": this.batch_size,
        "ema_decay": stage.ema_decay,
        "parameters": sum(parameter.numel() for parameter in stage.module.parameters()),
        **stage.identity,
    }
    path = folder / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(settings, indent=2) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in {**found, **settings} if settings.get(name) != found.get(name)]:
        differences = ", ".join(f"{name} {found.get(name)}, not {settings.get(name)}" for name in changed)
        raise ValueError(f"{folder}: contains a run with other settings ({differences}); give another --output_dir")
