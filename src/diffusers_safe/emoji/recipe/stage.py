"""One stage of the recipe: a module that is trained to its end, through any number of stops."""

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


@dataclass
class Stage:
    """A trainable module and where its batches come from.

    Args:
        name (`str`): Its folder, and part of the seed of its batches.
        module (`nn.Module`): Its forward takes what `make_batch` returns and gives the loss.
        steps (`int`): Optimizer steps. The schedule of the learning rate depends on it.
        learning_rate (`float`): Peak of the learning rate (AdamW).
        batch_size (`int`): Samples a step.
        make_batch (`Callable`): `(rng, size) -> dict`, the module's arguments; a function of the generator alone.
        ema_decay (`float`): Of the average of the weights, which is the result.
        mixed_precision (`str`, defaults to `"no"`): `"bf16"` where matrices are large enough to gain by it.
        identity (`dict`): What else the result depends on, such as a fingerprint of its data. A run that was begun
            with other values is not continued.
    """

    name: str
    module: nn.Module
    steps: int
    learning_rate: float
    batch_size: int
    make_batch: Callable[[np.random.Generator, int], dict[str, torch.Tensor]]
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    identity: dict = field(default_factory=dict)


def learning_rate_factor(step: int, steps: int, warmup: int = 200, decay: float = 0.4) -> float:
    """Warm-up, then constant, then a straight line to zero over the last `decay` of the steps."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (steps * decay)))


def train_stage(stage: Stage, output_dir: str | Path, seed: int = 0, checkpoint_minutes: float = 5.0) -> nn.Module:
    """Trains a stage to its end, from its newest checkpoint if there is one.

    Each batch is a function of (seed, name, step), so a stopped run continues as if it had not stopped.

    Returns:
        `nn.Module`: `stage.module` with its averaged weights, on the CPU.

    Raises:
        `ValueError`: If the folder holds a run of other settings, another process is at work there, or there are
            several processes.
    """
    folder = Path(output_dir) / stage.name
    with claimed(folder):
        return _train(stage, folder, seed, checkpoint_minutes)


def _train(stage: Stage, folder: Path, seed: int, checkpoint_minutes: float) -> nn.Module:
    _check_same_run(folder, stage, seed)
    finished = folder / "ema.pt"
    if finished.exists():
        stage.module.load_state_dict(torch.load(finished, weights_only=True))
        return stage.module

    AcceleratorState._reset_state()  # stages differ in precision
    accelerator = Accelerator(mixed_precision=stage.mixed_precision)
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
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    first = 0
    if checkpoints := list_checkpoints(folder):
        accelerator.load_state(str(checkpoints[-1]))
        first = checkpoint_step(checkpoints[-1])

    bar = tqdm(range(first, stage.steps), stage.name, stage.steps, initial=first, mininterval=10)
    saved_at, shown = time.monotonic(), None
    for step in bar:
        batch = stage.make_batch(np.random.default_rng([seed, *stage.name.encode(), step]), stage.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * learning_rate_factor(step, stage.steps)
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
        if time.monotonic() - saved_at > 60 * checkpoint_minutes and step + 1 < stage.steps:
            save_checkpoint(accelerator, folder, step + 1, limit=2)
            saved_at = time.monotonic()

    ema.copy_to(module.parameters())
    module = module.to("cpu", memory_format=torch.contiguous_format)
    partial = finished.with_suffix(".partial")
    with disk_errors(finished):
        torch.save(module.state_dict(), partial)
    partial.rename(finished)
    accelerator.free_memory()
    return module


def _check_same_run(folder: Path, stage: Stage, seed: int) -> None:
    mine = {
        "seed": seed,
        "steps": stage.steps,
        "learning_rate": stage.learning_rate,
        "batch_size": stage.batch_size,
        "ema_decay": stage.ema_decay,
        "mixed_precision": stage.mixed_precision,
        "parameters": sum(parameter.numel() for parameter in stage.module.parameters()),
        **stage.identity,
    }
    path = folder / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(mine, indent=2) + "\n")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]:
        differences = ", ".join(f"{name} {theirs.get(name)} there, {mine.get(name)} here" for name in changed)
        raise ValueError(f"{folder}: holds a run with other settings ({differences}); give another --output_dir")
