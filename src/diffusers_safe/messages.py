"""Notes and errors on stderr: one line, from one process."""

import logging
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from .files import disk_errors


logger = logging.getLogger(__name__)


# As accelerate reads them.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def num_launched() -> int:
    """The number of processes that were launched together; known before they know each other."""
    return max(1, _from_environment(_SIZES, 1))


def is_first_process() -> bool:
    """Whether this is the first, or only, process of a launch. A rank that is left over in the environment of a single
    process means nothing."""
    return num_launched() == 1 or _from_environment(_RANKS, 0) == 0


def _from_environment(names: tuple[str, ...], default: int) -> int:
    found = (os.environ[name].strip() for name in names if name in os.environ)
    return next((int(value) for value in found if value.isdecimal()), default)


def note(message: str, *args: Any) -> None:
    """Prints a note on stderr, from one process of those that were launched together."""
    if is_first_process():
        logger.warning(message, *args)


@contextmanager
def exit_with_error() -> Iterator[None]:
    """Ends the program with one line and code 1 where the work meets bad input (`ValueError`), a file that cannot be
    read or written (`OSError`) or numbers that have gone astray (`FloatingPointError`); silently, as `cat` does, where
    the reader of its output has gone (`| head -1`); with "stopped" and code 130 after Ctrl-C. An error may have its
    own `exit_code`."""
    try:
        try:
            with disk_errors("a file"):
                yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and not all(map(_has_reader, (sys.stdout, sys.stderr))):
            raise SystemExit(128 + signal.SIGPIPE) from None
        logger.debug("where it happened:", exc_info=True)
        reason = str(error).strip().split("\n")[0]
        if (code := getattr(error, "exit_code", None)) is None:
            raise SystemExit(f"error: {reason}") from None
        print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(code) from None


def _has_reader(stream: TextIO) -> bool:
    """Whether the other end of a pipe still reads; if not, the rest of what is written goes nowhere."""
    waiting = select.poll()
    waiting.register(stream.fileno(), 0)
    if not waiting.poll(0):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return False
