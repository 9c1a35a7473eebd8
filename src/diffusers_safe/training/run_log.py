"""What a run reports while it goes on: log.jsonl in the output folder, and a tracker such as TensorBoard."""

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ..files import json_lines, write_text
from ..output_folders import record_written
from .job import TrainingOptions
from .options import LOG_NAME


class ConceptLosses:
    """The mean loss of each trained prompt since it was last asked for.

    Args:
        prompts (`list[str]`): All that are ever trained.
    """

    def __init__(self, prompts: list[str]):
        self._rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        self._sums = torch.zeros(len(self._rows), 2, dtype=torch.float64)  # of losses, and how many

    def add(self, prompts: list[str], losses: torch.Tensor) -> None:
        """Losses of samples, `(B,)`."""
        for prompt, loss in zip(prompts, losses.tolist()):
            self._sums[self._rows[prompt]] += torch.tensor([loss, 1.0], dtype=torch.float64)

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Prompt -> mean over all processes, of those seen since the last time."""
        sums = accelerator.reduce(self._sums.float().to(accelerator.device), "sum").cpu()
        self._sums.zero_()
        return {prompt: (total / count).item() for prompt, (total, count) in zip(self._rows, sums) if count}


class RunLog:
    """Writes on the main process; does nothing without an output folder.

    Args:
        accelerator (`Accelerator`): Made with the tracker, if there is one.
        options (`TrainingOptions`): Of the run.
        first_step (`int`): The step that the run continues from; what an earlier one wrote of later steps is dropped.
    """

    def __init__(self, accelerator: Accelerator, options: TrainingOptions, first_step: int):
        self._accelerator = accelerator
        self._path = None
        folder = options.output.output_dir
        if folder is not None and accelerator.is_main_process:
            self._path = Path(folder) / LOG_NAME
            record_written(folder, LOG_NAME)
            _keep(self._path, first_step)
        self._tracks = folder is not None and options.checkpoints.report_to != "none"
        if self._tracks:
            config = {name: value if isinstance(value, (int, float)) else str(value)
                      for name, value in options.recorded.items()}  # fmt: skip
            accelerator.init_trackers("diffusers-safe", config)
        self._before = (time.monotonic(), 0)

    def write(self, step: int, measured: dict, rate: dict[str, float], forwards: int) -> None:
        """A row of log.jsonl, and the tracker; `forwards` is how many samples a denoiser has seen in this process."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **measured}, ensure_ascii=False) + "\n")
        now, (then, before) = time.monotonic(), self._before
        self._before = (now, forwards)
        speed = self._accelerator.num_processes * (forwards - before) / max(now - then, 1e-9)
        by_concept = {f"loss/{prompt}": value for prompt, value in measured.get("by_concept", {}).items()}
        numbers = {name: value for name, value in measured.items() if name != "by_concept"}
        self.follow(step, {**numbers, **by_concept, **rate, "forwards_per_second": speed})

    def follow(self, step: int, values: dict[str, float]) -> None:
        """The tracker alone."""
        if self._tracks:
            self._accelerator.log(values, step=step)

    def close(self) -> None:
        # Not `end_training`, which also ends the group of processes; they still have to wait for each other.
        for tracker in self._accelerator.trackers if self._tracks else ():
            tracker.finish()


def _keep(path: Path, step: int) -> None:
    """Leaves only what the log says about the steps that this run continues. Broken lines are dropped."""
    rows = json_lines(path) if path.is_file() else []
    kept = [
        line for line, row in rows if isinstance(row, dict) and _is_number(row.get("step")) and row["step"] <= step
    ]
    write_text(path, "".join(f"{line}\n" for line in kept))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
