"""Progress of long runs: a bar on the terminal, and a callback for programs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm.auto import tqdm


@dataclass(frozen=True)
class Progress:
    """The state of a run, as callbacks receive it.

    Attributes:
        task (`str`): What is being done, such as `"images of erased"` or `"nudity"`. A run may have several tasks.
        done (`int`): Finished items of the task, including those of an earlier run.
        total (`int`): All items of the task.
        seconds_left (`float`, *optional*): Estimated time to the end of the task; `None` before the first item.
    """

    task: str
    done: int
    total: int
    seconds_left: float | None = None


ProgressCallback = Callable[[Progress], None]


class ProgressBar:
    """Shows the progress of a task on the terminal and reports it to a callback. A context manager.

    An exception that the callback raises ends the task between two items: what was written is complete, and the same
    call continues there.

    Args:
        task (`str`): What is being done.
        total (`int`): Number of items.
        done (`int`, defaults to 0): Items that are finished already.
        unit (`str`, defaults to `"image"`): What an item is called.
        callback (`Callable[[Progress], None]`, *optional*): Called at the start and after each item or batch.
        hidden (`bool`, defaults to `False`): Show no bar and do not call the callback, as in all processes but the
            first.
    """

    def __init__(
        self,
        task: str,
        total: int,
        done: int = 0,
        unit: str = "image",
        callback: ProgressCallback | None = None,
        hidden: bool = False,
    ):
        self.task, self.total, self.done = task, total, done
        self.callback = None if hidden else callback
        self._first, self._started = done, time.monotonic()
        self._bar = tqdm(desc=task, total=total, initial=done, unit=unit, dynamic_ncols=True, disable=hidden)

    def __enter__(self) -> "ProgressBar":
        try:
            self._report()
        except BaseException:
            self._bar.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """Counts finished items."""
        self.done += count
        self._bar.update(count)
        self._report()

    def _report(self) -> None:
        if self.callback is None:
            return
        finished = self.done - self._first
        seconds = (time.monotonic() - self._started) / finished * (self.total - self.done) if finished else None
        self.callback(Progress(self.task, self.done, self.total, seconds))
