"""Checkpoints that are either whole or absent: written under a hidden name, then renamed."""

import json
import re
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator

from ..files import disk_errors, follow_umask
from ..output_folders import make_way, record_written, recorded_names, remove_leftover, states_of


RUN_FILE = "run.json"  # in a checkpoint of a training: what a run that continues must share
_FILES = (RUN_FILE, "*.pkl", "*.bin", "scaler.pt")  # of accelerate, and ours


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int | None = None) -> Path:
    """Saves what the accelerator knows: optimizers, random states, registered objects (of models only what trains, see
    `TrainingLoop.make_resumable`).

    Call it on every process. A kill at any moment leaves the previous checkpoints untouched.

    Args:
        folder (`Path`): Where `checkpoint-<step>` appears.
        step (`int`): Number of optimizer steps done.
        limit (`int`, *optional*): Keep only this many checkpoints, the newest.
    """
    target = folder / f"checkpoint-{step}"
    partial = folder / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        remove_leftover(folder, partial.name)
    accelerator.wait_for_everyone()
    try:
        with disk_errors(target):
            accelerator.save_state(str(partial))
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        follow_umask(partial)
        if target.exists():
            _remove(target)
        states = {f"{target.name}/{name}": state for name, state in states_of(partial).items()}
        record_written(folder, states=states)
        partial.rename(target)
        if limit is not None:
            for old in list_checkpoints(folder)[:-limit]:
                _remove(old)
    accelerator.wait_for_everyone()
    return target


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint's files, and the folder unless it holds another's."""
    if (checkpoint / RUN_FILE).is_file():  # of an earlier version, which kept no record of its files
        own = {path for pattern in _FILES for path in checkpoint.glob(pattern)}
        record_written(checkpoint.parent, *(f"{checkpoint.name}/{path.name}" for path in own))
    make_way(checkpoint.parent, [checkpoint.name])


def check_same_run(checkpoint: str | Path, identity: dict) -> None:
    """Whether a checkpoint was saved by a run with these facts, of those that its `run.json` holds.

    Raises:
        `ValueError`: If not, with what differs.
    """
    path = Path(checkpoint) / RUN_FILE
    if not path.is_file():
        raise ValueError(f"resume_from_checkpoint {checkpoint}: has no {RUN_FILE}: not a checkpoint of this package")
    try:
        state = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"resume_from_checkpoint {path}: cannot be read ({error})") from None
    identity = json.loads(json.dumps(identity))
    if different := sorted(name for name in identity if state.get(name) != identity[name]):
        shown = ", ".join(f"{name} {state.get(name)} there, {identity[name]} here" for name in different)
        raise ValueError(f"resume_from_checkpoint: the checkpoint is of another run: {shown[:400]}")


def check_files(checkpoint: str | Path) -> None:
    """Whether the files of a checkpoint are whole, as far as can be seen without reading them.

    Raises:
        `ValueError`: If one is missing or damaged.
    """
    checkpoint = Path(checkpoint)
    present = {path.name for pattern in _FILES for path in checkpoint.glob(pattern)}
    recorded = {
        Path(name).name for name in recorded_names(checkpoint.parent) if Path(name).parent.name == checkpoint.name
    }
    needed = {"optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"}
    for name in sorted(needed | {name for name in present | recorded if name.endswith((".pkl", ".bin"))}):
        if not _is_whole(checkpoint / name):
            state = "is damaged" if name in present else "is missing"
            raise ValueError(f"resume_from_checkpoint {checkpoint}: {name} {state}; take an earlier checkpoint")


def _is_whole(path: Path) -> bool:
    """Whether a file of torch.save has the check sums that it was written with."""
    try:
        with zipfile.ZipFile(path) if path.is_file() else nullcontext() as archive:
            return archive is not None and archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    named = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found = [path for path in named if any(path.glob("*.pkl"))]  # accelerate's random states
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The number of optimizer steps a checkpoint was saved at, read from its name."""
    return int(path.name.removeprefix("checkpoint-"))
