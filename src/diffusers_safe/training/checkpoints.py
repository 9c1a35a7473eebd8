"""Checkpoints that are either whole or absent: written under a hidden name, then renamed."""

import re
import shutil
from pathlib import Path

from accelerate import Accelerator


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int | None = None) -> Path:
    """Saves everything the accelerator knows (models, optimizers, random states, registered objects).

    Call it on every process. A kill at any moment leaves the previous checkpoints untouched.

    Args:
        folder (`Path`): Where `checkpoint-<step>` appears.
        step (`int`): Number of optimizer steps done.
        limit (`int`, *optional*): Keep only this many checkpoints, the newest.
    """
    target = folder / f"checkpoint-{step}"
    partial = folder / f".checkpoint-{step}.partial"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        if limit is not None:
            for old in list_checkpoints(folder)[:-limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The number of optimizer steps a checkpoint was saved at, read from its name."""
    return int(path.name.removeprefix("checkpoint-"))
