"""Command lines from dataclasses: what is wrong is told in one line before any work starts."""

import logging
import os
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from transformers import HfArgumentParser


logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments")


def parse_dataclass(
    kind: type[Arguments],
    description: str | None = None,
    argv: list[str] | None = None,
    prog: str | None = None,
    check: Callable[[Arguments], None] | None = None,
) -> Arguments:
    """Reads a command line into a dataclass whose `__post_init__` checks its values.

    Args:
        kind (`type`): The dataclass; a field's `help` metadata is its help.
        description (`str`, *optional*): Head of `--help`.
        argv (`list[str]`, *optional*): The words; those of the process by default.
        prog (`str`, *optional*): Name of the program in messages.
        check (`Callable`, *optional*): Looks at what lies outside the arguments: files, folders, models.

    Raises:
        `SystemExit`: With code 2 after one line on stderr, where `__post_init__` or `check` raises a `ValueError`.
    """
    parser = HfArgumentParser(kind, description=description, prog=prog, formatter_class=ArgumentDefaultsHelpFormatter)
    tell_errors_in_one_line(parser)
    namespace = parser.parse_args(argv)
    try:
        arguments = kind(**{item.name: getattr(namespace, item.name) for item in fields(kind)})
        if check is not None:
            check(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def tell_errors_in_one_line(parser: ArgumentParser) -> None:
    """One line from one process, instead of argparse's page of usage from each; and options by their full names."""
    first_process = os.environ.get("RANK", "0") == "0"
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n" if first_process else None)
    parser.allow_abbrev = False


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Ends the program with one line and code 1 where the work meets bad input (`ValueError`), a file that cannot be
    read or written (`OSError`) or numbers that have gone astray (`FloatingPointError`)."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        logger.debug("where it happened:", exc_info=True)
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"error: {reason}") from None


def check_output_dir(folder: str | Path) -> None:
    """Creates an output folder, to know before the work whether it can be written.

    Raises:
        `ValueError`: If it cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {folder}: cannot be written ({error.strerror})") from None
