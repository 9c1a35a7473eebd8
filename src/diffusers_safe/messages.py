"""Notes and errors on stderr: one line, from one process."""

import atexit
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TextIO

from .files import disk_errors


logger = logging.getLogger(__name__)
_stopped_by: list[int] = []  # signals that the command has received

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
    own `exit_code`. SIGTERM is as Ctrl-C, with code 143."""
    try:
        try:
            with disk_errors("a file"), _stoppable():
                yield
        finally:
            sys.stdout.flush()
            _ignore_signals_at_exit()
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or _stopped_by:  # a library may have made any error of it
            print("stopped", file=sys.stderr)
            raise SystemExit(128 + next(iter(_stopped_by), signal.SIGINT)) from None
        if not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        if isinstance(error, BrokenPipeError) and not all(map(_has_reader, (sys.stdout, sys.stderr))):
            raise SystemExit(128 + signal.SIGPIPE) from None
        logger.debug("where it happened:", exc_info=True)
        reason = str(error).strip().split("\n")[0]
        if (code := getattr(error, "exit_code", None)) is None:
            raise SystemExit(f"error: {reason}") from None
        print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(code) from None


@contextmanager
def importing() -> Iterator[None]:
    """Ends the program at once where Ctrl-C or SIGTERM comes in the middle of an import of large libraries: what they
    make of a `KeyboardInterrupt` may be any error, or an abort. Nothing has been written by then."""

    def end(number: int, frame: Any) -> None:
        print("stopped", file=sys.stderr, flush=True)
        os._exit(128 + number)

    with _handling(end, _stop):
        yield


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raises `KeyboardInterrupt` at SIGTERM, too, and remembers which of the signals it was."""
    _stopped_by.clear()
    with _handling(_stop, signal.default_int_handler, signal.SIG_DFL):
        yield


@contextmanager
def _handling(handler: Callable, *known: Any) -> Iterator[None]:
    """Sets a handler for both signals, unless they have one that is not among the known ones."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    before = {number: old for number, old in before.items() if old in known}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _stop(number: int, frame: Any) -> None:
    _stopped_by.append(number)
    raise KeyboardInterrupt


@cache
def _ignore_signals_at_exit() -> None:
    """What comes while Python frees its memory, half a second for torch, would give a program that has done its work
    the code of one that was stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        atexit.register(signal.signal, number, signal.SIG_IGN)


def _has_reader(stream: TextIO) -> bool:
    """Whether the other end of a pipe still reads; if not, the rest of what is written goes nowhere."""
    waiting = select.poll()
    waiting.register(stream.fileno(), 0)
    if not waiting.poll(0):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return False
