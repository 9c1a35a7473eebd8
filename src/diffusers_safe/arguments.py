"""Command lines from dataclasses: what is wrong is told in one line before any work starts."""

from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from transformers import HfArgumentParser


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
    namespace = parser.parse_args(argv)
    try:
        arguments = kind(**{item.name: getattr(namespace, item.name) for item in fields(kind)})
        if check is not None:
            check(arguments)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments


def check_output_dir(folder: str | Path) -> None:
    """Creates an output folder, to know before the work whether it can be written.

    Raises:
        `ValueError`: If it cannot.
    """
    probe = Path(folder) / ".probe"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {folder}: cannot be written ({error.strerror})") from None
