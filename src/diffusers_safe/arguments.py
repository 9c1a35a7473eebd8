"""Command lines from dataclasses: what is wrong is told in one line before any work starts."""

import logging
import os
import sys
import tempfile
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser


logger = logging.getLogger(__name__)
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container")  # in its errors
Arguments = TypeVar("Arguments")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Descriptions as they are written, and the defaults that say something."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def parse_dataclass(
    kind: type[Arguments],
    description: str | None = None,
    argv: list[str] | None = None,
    prog: str | None = None,
    check: Callable[[Arguments], None] | None = None,
    presets: dict[str, dict[str, Any]] | None = None,
) -> Arguments:
    """Reads a command line into a dataclass whose `__post_init__` checks its values.

    `--config FILE` reads options from a YAML file first, a key for each; what the command line says wins.

    Args:
        kind (`type`): The dataclass; a field's `help` metadata is its help.
        description (`str`, *optional*): Head of `--help`.
        argv (`list[str]`, *optional*): The words; those of the process by default.
        prog (`str`, *optional*): Name of the program in messages.
        check (`Callable`, *optional*): Looks at what lies outside the arguments: files, folders, models.
        presets (`dict[str, dict]`, *optional*): Values that `--preset NAME` puts in place of the defaults; the
            dataclass then has a field `preset`.

    Raises:
        `SystemExit`: With code 2 after one line on stderr, where `__post_init__` or `check` raises a `ValueError`.
    """
    parser = HfArgumentParser(kind, description=description, prog=prog, formatter_class=_HelpFormatter)
    tell_errors_in_one_line(parser)
    parser.add_argument("--config", help="YAML file with options, a key for each; those given here win.")
    words = sys.argv[1:] if argv is None else argv
    try:
        config = _read_config(_value_of("--config", words))
        parser.set_defaults(**{name: [] for name, value in config.items() if value == []})
        words = [*_words(config), *words]
        if presets is not None:
            preset = _value_of("--preset", words) or parser.get_default("preset")
            words = [*_words(presets.get(preset, {})), *words]
        namespace, unknown = parser.parse_known_args(words)
        if unknown:
            raise ValueError(f"unrecognized arguments: {_unrecognized(unknown, kind)}")
        arguments = kind(**{item.name: getattr(namespace, item.name) for item in fields(kind)})
        if check is not None:
            check(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _unrecognized(words: list[str], kind: type) -> str:
    """Unknown options, by name only because a value may be a secret, with those that were probably meant."""
    known = [f"--{item.name}" for item in fields(kind)]
    told = []
    for name in [word.split("=")[0] for word in words if word.startswith("--")] or words:
        close = get_close_matches(name, known, n=1, cutoff=0.8)
        told.append(f"{name} (did you mean {close[0]}?)" if close else name)
    return " ".join(told)


def _value_of(option: str, words: list[str]) -> str | None:
    """The last value of an option on a command line."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(option, dest="value", nargs="?")  # that it lacks a value is told by the real parser
    return finder.parse_known_args(words)[0].value


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        # Everything as text, as on a command line: `no` is a word.
        options = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or type(error).__name__
        mark = getattr(error, "problem_mark", None)  # the line's text may hold a secret
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"config {path}: cannot be read as YAML ({reason}{where})") from None
    if not isinstance(options, dict):
        raise ValueError(f"config {path}: must hold a mapping of options to values")
    if "config" in options:
        raise ValueError(f"config {path}: names another config")
    return options


def _words(options: dict[str, Any]) -> list[str]:
    """Options as a command line says them; those without a value are left to the default."""
    words = []
    for name, value in options.items():
        if isinstance(value, list) and value:
            words += [f"--{name}", *map(str, value)]
        elif value not in ([], None, "", "null", "~"):
            words.append(f"--{name}={value}")
    return words


def tell_errors_in_one_line(parser: ArgumentParser) -> None:
    """One line from one process, instead of argparse's page of usage from each; and options by their full names."""
    first_process = os.environ.get("RANK", "0") == "0"
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n" if first_process else None)
    parser.allow_abbrev = False


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Ends the program with one line and code 1 where the work meets bad input (`ValueError`), a file that cannot be
    read or written (`OSError`, and what torch and safetensors make of a full disk) or numbers that have gone astray
    (`FloatingPointError`). An error may have an `exit_code` of its own."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, RuntimeError, SafetensorError) as error:
        full_disk = isinstance(error, (RuntimeError, SafetensorError))  # not an OSError in torch.save and safetensors
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in _TORCH_SAVE):
            raise
        logger.debug("where it happened:", exc_info=True)
        reason = str(error).strip().split("\n")[0]
        reason = f"a file could not be written, or read: is the disk full? ({reason})" if full_disk else reason
        if (code := getattr(error, "exit_code", None)) is None:
            raise SystemExit(f"error: {reason}") from None
        print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(code) from None


def check_output_dir(folder: str | Path) -> None:
    """Creates an output folder, to know before the work whether it can be written.

    Raises:
        `ValueError`: If it cannot.
    """
    check_writable(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder}: cannot be made ({error.strerror})") from None


def check_writable(folder: str | Path) -> None:
    """The same without creating it, which is asked of the nearest folder above it that exists.

    Raises:
        `ValueError`: If it cannot be written.
    """
    place = Path(folder).absolute()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {folder}: cannot be written ({error.strerror})") from None
