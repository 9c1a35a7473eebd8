"""The processes started by `accelerate launch` or `torchrun`."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..messages import num_launched


def launched_processes() -> PartialState:
    """The state of this process among those launched together, and its device.

    Unlike `PartialState()`, it also detects several processes on a CPU.

    Raises:
        `ValueError`: If several processes were launched that are not connected.
    """
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    launched = num_launched()
    if launched != processes.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but they are not connected: set ACCELERATE_USE_CPU=true if there is"
            " no GPU for each"
        )
    return processes
