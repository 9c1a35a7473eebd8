"""The processes that `accelerate launch` or `torchrun` started together."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


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
