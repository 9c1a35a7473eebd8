"""The processes that `accelerate launch` or `torchrun` started together, and other runs that must wait."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from filelock import FileLock, Timeout


def launched_processes() -> PartialState:
    """This process among those that were launched together, and its device.

    Unlike `PartialState()` itself it knows of several processes on a CPU, too.

    Raises:
        `ValueError`: If several were launched and do not know of each other.
    """
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each would work by itself: set ACCELERATE_USE_CPU=true where"
            " there is no GPU for each"
        )
    return processes


@contextmanager
def alone_in(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be.

    Args:
        folder (`Path`): Where this run works.
        name (`str`, defaults to `".lock"`): Of the file that says so meanwhile.

    Raises:
        `ValueError`: If there is another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise ValueError(f"{folder}: another run is at work there; wait for its end") from None
