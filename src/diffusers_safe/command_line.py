"""Command lines and YAML files read into dataclasses of options."""

import logging
import shlex
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from dataclasses import MISSING
from importlib.metadata import PackageNotFoundError, version
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from .arguments import Declared, build_options, check_values, declared_options
from .messages import is_first_process
from .values import plain_word, suggested
from .yaml_files import read_yaml


logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments")


def parse_dataclass(
    kind: type[Arguments],
    description: str | None = None,
    argv: list[str] | None = None,
    prog: str | None = None,
    check: Callable[[Arguments], None] | None = None,
    positional: str | None = None,
    fixed: dict[str, str] | None = None,
) -> Arguments:
    """Reads a command line into a dataclass; its types are checked by [`check_values`], its values by `__post_init__`.

    `--config FILE` reads options from a YAML file, a key for each, which the command line replaces. A dataclass with
    `PRESETS` has an option `preset`, see [`OptionGroups`]. A list option that
    is given several times on the command line is extended. In names `_` and `-` count alike.

    Args:
        kind (`type`): The dataclass; a field's `help` metadata is its help.
        description (`str`, *optional*): Head of `--help`.
        argv (`list[str]`, *optional*): The words; those of the process by default.
        prog (`str`, *optional*): Name of the program in messages; that of the script or module by default.
        check (`Callable`, *optional*): Checks what lies outside the arguments: files, folders, models.
        positional (`str`, *optional*): Name of the option that may be given without its name.
        fixed (`dict[str, str]`, *optional*): More keys that a config file may have, with the values they must have.

    Raises:
        `SystemExit`: With code 2 after one line on stderr, if an option is not known, a value does not fit, or `check`
            raises a `ValueError` or an `OSError`.
    """
    parser, names = _make_parser(kind, description, prog)
    words = [_with_underscores(word, names) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        given, unknown = parser.parse_known_args(words)
        given = vars(given)
        if positional is not None and unknown and not unknown[0].startswith("-"):
            given.setdefault(positional, unknown.pop(0))
        if unknown:
            raise ValueError(f"unrecognized arguments: {_unrecognized(unknown, names)}")
        config = read_config(given.pop("config", None), kind, fixed)
        arguments = build_options(kind, {**config, **check_values(kind, given)})
        if check is not None:
            check(arguments)
    except (ValueError, OSError, RecursionError) as error:
        logger.debug("where it happened:", exc_info=True)
        parser.error(" ".join(str(error).split()) or type(error).__name__)
    return arguments


def _make_parser(kind: type, description: str | None, prog: str | None) -> tuple[ArgumentParser, dict[str, None]]:
    """The parser, which leaves out what is not given and converts nothing, and the names that it knows."""
    parser = ArgumentParser(
        prog=prog or _module_that_runs(),
        usage="%(prog)s [options]",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        argument_default=SUPPRESS,
        add_help=False,
    )
    report_errors_in_one_line(parser)
    names, sections = {}, {}
    declared = list(declared_options(kind).values())
    for item in sorted(declared, key=lambda item: _section(item)[0]):
        title = _section(item)[1]
        section = sections[title] if title in sections else parser.add_argument_group(title)
        sections[title] = section
        help = item.facts.get("help", "")
        if item.default not in (MISSING, None, "", [], ()):
            help += f" (default: {_as_typed(item.default)})"
        how = {"help": help.replace("%", "%%")}
        parts = get_args(item.kind) if get_origin(item.kind) in (Union, UnionType) else (item.kind,)
        if any((get_origin(part) or part) in (list, tuple) for part in parts):
            how |= {"nargs": "+", "action": "extend"}
        elif bool in parts:
            how |= {"nargs": "?", "const": True}
        names[item.name] = None
        section.add_argument(f"--{item.name}", **how)
        if item.default is True:
            names[f"no_{item.name}"] = None
            section.add_argument(
                f"--no_{item.name}", action="store_false", dest=item.name, help=f"Same as --{item.name} false."
            )
    removed = getattr(kind, "REMOVED", {})
    for name in removed:
        parser.add_argument(f"--{name}", help=SUPPRESS)
    general = parser.add_argument_group("general options")
    general.add_argument("-h", "--help", action="help", help="Show this message and exit.")
    general.add_argument(
        "--config",
        help="YAML file with options, a key for each. What is given on the command line replaces the file's value; a "
        "list option that is given several times on the command line is extended.",
    )
    general.add_argument("--version", action="version", version=f"diffusers-safe {package_version()}")
    return parser, {**names, **dict.fromkeys(removed), "config": None, "version": None, "help": None}


def _module_that_runs() -> str | None:
    """A module of this package that was started with `python -m`, as messages name the program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith(f"{__package__}."):
        return None
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _as_typed(value: Any) -> str:
    """A default as it would be typed: texts with spaces in quotes."""
    parts = map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return " ".join(shlex.quote(part) if " " in part else part for part in parts)


def _section(item: Declared) -> tuple[int, str]:
    """Place and title of the section of `--help` that shows an option: required ones, those of groups that come
    first, common ones, and the rest by their groups."""
    if item.default is MISSING:
        return 0, "required options"
    if item.first:
        return 1, item.title
    if item.title is None or item.facts.get("essential", False):
        return 2, "common options"
    return 3, item.title


def _with_underscores(word: str, names: Iterable[str]) -> str:
    """`--max-train-steps=3` as `--max_train_steps=3`, if it is the name of an option."""
    name, equals, value = word.partition("=")
    known = name[2:].replace("-", "_")
    return f"--{known}{equals}{value}" if name.startswith("--") and known in names else word


def _unrecognized(words: list[str], names: Iterable[str]) -> str:
    """Unknown options, without values, which may be secret, and the options that were probably meant."""
    options = [word for word in words if word[:1] in ("-", "–", "—")]
    return " ".join(suggested(word.partition("=")[0], names) for word in options or words)


def read_config(path: str | None, kind: type, fixed: dict[str, str] | None = None) -> dict[str, Any]:
    """The options of a dataclass in a YAML file. A key without a value is left out, as are those of `fixed`.

    Raises:
        `ValueError`: If the file cannot be read, a key is none of the options, or a value does not fit.
    """
    if path is None:
        return {}
    options = {} if (found := read_yaml(path, "config")) is None else found
    if not isinstance(options, dict):
        raise ValueError(f"config {path}: must hold a mapping of options to values")
    options = {str(name).replace("-", "_"): value for name, value in options.items()}
    if "config" in options:
        raise ValueError(f"config {path}: names another config")
    for name, value in (fixed or {}).items():
        found = options.pop(name, None)
        if found is not None and plain_word(found) != plain_word(value):
            raise ValueError(f"config {path}: {name} is {found}, here it must be {value}")
    names = [*declared_options(kind), *getattr(kind, "REMOVED", {})]
    if unknown := [name for name in options if name not in names]:
        listed = " ".join(suggested(f"--{name}", names) for name in unknown)
        raise ValueError(f"config {path}: unrecognized arguments: {listed}")
    try:
        return check_values(kind, {name: value for name, value in options.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from None


def package_version() -> str:
    try:
        return version("diffusers-safe")
    except PackageNotFoundError:
        return "(not installed)"


def report_errors_in_one_line(parser: ArgumentParser) -> None:
    """One line from one process, instead of argparse's page of usage from each; and options by their full names."""

    def error(message: str) -> None:
        line = f"{parser.prog}: error: {message}\n".encode("utf-8", "backslashreplace").decode()
        parser.exit(2, line if is_first_process() else None)

    parser.error, parser.allow_abbrev = error, False
