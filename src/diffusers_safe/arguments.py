"""Options: types and limits checked by one function for Python, YAML files and command lines, and one line for an
error."""

import inspect
import logging
import math
import numbers
import operator
import os
import re
import select
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from decimal import Decimal
from difflib import get_close_matches
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .files import disk_errors


logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# Upper limits by the name of an option, wherever it occurs: with more, no run could start or end.
AT_MOST = {
    "rank": 2**14,
    "resolution": 2**14,
    "height": 2**14,
    "width": 2**14,
    "resize": 2**16,
    "max_train_steps": 10**8,
    "train_batch_size": 2**16,
    "batch_size": 2**16,
    "scoring_batch_size": 2**16,
    "gradient_accumulation_steps": 10**6,
    "num_inference_steps": 10**4,
    "trajectory_pool": 10**7,
    "images_per_prompt": 10**6,
    "num_validation_images": 10**3,
    "pictures": 10**5,
    "num_seeds": 10**6,
    "inversion_steps": 10**8,
    "inversion_batch_size": 2**16,
    "inversion_num_pictures": 10**6,
    "kid_subsets": 10**6,
    "kid_subset_size": 10**7,
    "shard_size": 10**7,
    "concurrency": 10**4,
    "retries": 10**3,
    "timeout": 86400,
    "dataloader_num_workers": 1024,
}
MAX_ENTRIES = 10**6  # of a list
MAX_YAML_BYTES = 2**24
MAX_YAML_ALIASES = 100
_LIMITS = {
    "at_least": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("less than", operator.lt),
}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


class _Misfit(Exception):
    """A value that is not of the type; the text says what is wrong with it."""


def option(default: Any, help: str, choices: Iterable[str | None] | None = None, **facts: Any) -> Any:
    """Declares an option: a field of a dataclass with the line that `--help` shows and the values that are allowed.

    Args:
        default (`Any`): Its default; a list is copied for each instance.
        help (`str`): One line.
        choices (`Iterable[str]`, *optional*): The allowed texts.
        facts: Limits of a number (`at_least`, `above`, `at_most`, `below`); `essential=True` shows the option first in
            `--help`; `recorded=False` keeps it out of records; `may_change=True` lets a resumed run change it.
    """
    metadata = {"help": help, "choices": choices, **facts}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, repr=not facts.get("secret", False), metadata=metadata)


def required(help: str, **facts: Any) -> Any:
    """An [`option`] without a default."""
    return field(metadata={"help": help, **facts})


def group(title: str) -> Any:
    """Declares a field that holds a dataclass of options; on command lines and in files their names stand alone."""
    return field(metadata={"group": title})


@dataclass(frozen=True)
class Declared:
    """What is declared of an option.

    Attributes:
        name (`str`): On command lines and in files.
        kind (`Any`): Its type.
        default (`Any`): `MISSING` if it is required.
        facts (`Mapping[str, Any]`): As in [`option`].
        place (`str`, *optional*): The field of the group that holds it.
        title (`str`, *optional*): The title of that group.
    """

    name: str
    kind: Any
    default: Any
    facts: Mapping[str, Any]
    place: str | None = None
    title: str | None = None


@cache
def declared_options(kind: type) -> dict[str, Declared]:
    """All options of a dataclass by name, those of its groups included."""
    hints, found = _type_hints(kind), {}
    for item in fields(kind):
        if "group" in item.metadata:
            for inner in declared_options(hints[item.name]).values():
                found[inner.name] = replace(inner, place=item.name, title=item.metadata["group"])
        elif item.init:
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            found[item.name] = Declared(item.name, hints[item.name], default, item.metadata)
    for name, default in getattr(kind, "DEFAULTS", {}).items():
        found[name] = replace(found[name], default=default)
    return found


def build_options(kind: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """Makes a dataclass of options, with its groups, from values by name; a preset's values stand for those that are
    not given.

    Raises:
        `ValueError`: If a name is unknown, a value does not fit, or a required option is missing.
    """
    declared = declared_options(kind)
    if unknown := [suggested(name, declared, "") for name in sorted(values.keys() - declared.keys())]:
        raise ValueError(f"{', '.join(unknown)}: no such option")
    if presets := getattr(kind, "PRESETS", {}):
        values = {**presets.get(values.get("preset", declared["preset"].default), {}), **values}
    if missing := [name for name, item in declared.items() if item.default is MISSING and name not in values]:
        raise ValueError(f"the following arguments are required: {', '.join(f'--{name}' for name in missing)}")
    values = {**getattr(kind, "DEFAULTS", {}), **check_values(kind, values)}
    groups = {item.name: {} for item in fields(kind) if "group" in item.metadata}
    own = {}
    for name, value in values.items():
        place = declared[name].place
        (own if place is None else groups[place])[name] = value
    hints = _type_hints(kind)
    return kind(**own, **{name: build_options(hints[name], inner) for name, inner in groups.items()})


class OptionGroups:
    """Base class of dataclasses whose options are in groups.

    Attributes:
        DEFAULTS (`dict[str, Any]`): Defaults that differ from those of the groups.
        PRESETS (`dict[str, dict[str, Any]]`): Values by the name that the option `preset` takes.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def of(cls, **values: Any):
        """The options with these values, by the names that command lines and files use; see [`build_options`]."""
        return build_options(cls, values)

    @property
    def flat(self) -> dict[str, Any]:
        """All values by name."""
        return {
            name: getattr(self if item.place is None else getattr(self, item.place), name)
            for name, item in declared_options(type(self)).items()
        }

    def with_values(self, **values: Any):
        """A copy with other values."""
        return build_options(type(self), {**self.flat, **values})

    def select(self, fact: str, value: Any) -> dict[str, Any]:
        """The values of the options that are declared with this fact."""
        declared = declared_options(type(self))
        return {name: own for name, own in self.flat.items() if declared[name].facts.get(fact) == value}


def typed(target: Callable) -> Callable:
    """Decorator of a function or a dataclass: converts its arguments to their annotations, or raises a `ValueError`
    that names the argument, the value and what is allowed. See [`check_values`]."""
    function = target.__init__ if isinstance(target, type) else target
    signature = inspect.signature(function)

    @wraps(function)
    def checked(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(check_values(target, bound.arguments))
        return function(*bound.args, **bound.kwargs)

    if isinstance(target, type):
        target.__init__ = checked
        return target
    return checked


def check_values(target: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values to the types that a function or a dataclass declares for them.

    Text is read as a number, or as `true` or `false`, where the type asks for it; a single text stands for a list of
    one; paths, tuples and numpy scalars are accepted. Numbers must be finite and at most `AT_MOST`. Types that are not
    known here are left as they are.

    Args:
        target (`Callable`): The function or dataclass. A field's metadata may hold `choices`.
        values (`Mapping[str, Any]`): By name.

    Returns:
        `dict[str, Any]`: The same names.

    Raises:
        `ValueError`: If a value does not fit.
    """
    if is_dataclass(target):
        declared = declared_options(target)
        return {
            name: check_value(name, value, declared[name].kind, **_allowed(declared[name].facts))
            if name in declared
            else value
            for name, value in values.items()
        }
    hints = _type_hints(target)
    return {name: check_value(name, value, hints[name]) if name in hints else value for name, value in values.items()}


def _allowed(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("choices", *_LIMITS) if name in facts}


@cache
def _type_hints(target: Callable) -> dict[str, Any]:
    """The types of the parameters that are given by name."""
    function = target.__init__ if isinstance(target, type) else target
    hints = get_type_hints(function)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = inspect.signature(function).parameters.values()
    return {item.name: hints[item.name] for item in known if item.name in hints and item.kind not in variable}


def check_value(name: str, value: Any, kind: Any, choices: Iterable[str | None] | None = None, **limits: float) -> Any:
    """[`check_values`] for one value; `limits` are those of [`option`]."""
    try:
        value = _converted(value, kind)
    except _Misfit as misfit:
        shown = "" if "token" in name else f" {misfit.args[1]}"
        raise ValueError(f"{name}{shown}: {misfit.args[0]}") from None
    most = AT_MOST.get(name)
    if most is not None and isinstance(value, (int, float)) and value > most:
        raise ValueError(f"{name} {value}: must be at most {most:,}")
    if limits and isinstance(value, (int, float)):
        if not all(_LIMITS[limit][1](value, bound) for limit, bound in limits.items()):
            allowed = " and ".join(f"{_LIMITS[limit][0]} {bound:,}" for limit, bound in limits.items())
            raise ValueError(f"{name} {value}: must be {allowed}")
    if choices is None or value is None:
        return value
    return (
        [choose(name, entry, choices) for entry in value] if isinstance(value, list) else choose(name, value, choices)
    )


def choose(name: str, value: str, allowed: Iterable[str | None]) -> str:
    """The one of the allowed values that is meant; `_` and `-` count alike.

    Raises:
        `ValueError`: If there is none.
    """
    known = [word for word in allowed if word is not None]
    if value in known:
        return value
    for word in known:
        if word.replace("_", "-").casefold() == str(value).strip().replace("_", "-").casefold():
            return word
    raise ValueError(f"{name} '{value}': unknown; allowed are {', '.join(known)}")


def _converted(value: Any, kind: Any) -> Any:
    """The value as the type, or a [`_Misfit`] with what is allowed and the value as messages show it."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a scalar of numpy or torch
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return None
    kinds = [option for option in kinds if option is not NoneType]
    if Any in kinds:
        return value
    exact = [option for option in kinds if _is_class(option) and isinstance(value, get_origin(option) or option)]
    wrong = []
    for option in exact or kinds:
        try:
            return _as_kind(value, option)
        except _Misfit as misfit:
            wrong.append(misfit)
    if len(wrong) == 1:
        raise wrong[0]
    allowed = dict.fromkeys(misfit.args[0].removeprefix("must be ") for misfit in wrong)
    raise _Misfit(f"must be {' or '.join(allowed)}", shown(value))


def _as_kind(value: Any, kind: Any) -> Any:
    origin = get_origin(kind) or kind
    if origin in (list, tuple, Sequence, Iterable):
        return _as_list(value, kind, tuple if origin is tuple else list)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _Misfit("must be a mapping", shown(value))
        return value
    fits = {bool: _as_bool, int: _as_int, float: _as_float, str: _as_text, Path: _as_text}.get(origin)
    if fits is not None:
        if (converted := fits(value)) is None:
            raise _Misfit(f"must be {_KINDS[origin]}", shown(value))
        return Path(converted) if origin is Path else converted
    if _is_class(origin) and not isinstance(value, origin):
        if is_dataclass(origin) or isinstance(value, (NoneType, str, bytes, int, float, list, tuple, dict, set)):
            raise _Misfit(f"must be a {origin.__name__}", shown(value))
    return value


def _is_class(kind: Any) -> bool:
    kind = get_origin(kind) or kind
    return isinstance(kind, type) and not getattr(kind, "_is_protocol", False)


def _as_list(value: Any, kind: Any, make: type) -> list | tuple:
    entry = next(iter(get_args(kind)), Any)
    if isinstance(value, (str, os.PathLike)):
        value = [value]
    elif not isinstance(value, (list, tuple)) and hasattr(value, "tolist"):
        value = value.tolist()  # of numpy, pandas, torch
    if not isinstance(value, (list, tuple)):
        names = {str: "texts", int: "whole numbers", float: "numbers"}
        raise _Misfit(f"must be a list{f' of {names[entry]}' if entry in names else ''}", shown(value))
    if len(value) > MAX_ENTRIES:
        raise _Misfit(f"must have at most {MAX_ENTRIES:,} entries", f"of {len(value):,} entries")
    entries = []
    for position, part in enumerate(value, 1):
        try:
            entries.append(_converted(part, entry))
        except _Misfit as misfit:
            where = f" (entry {position} of {len(value)})" if len(value) > 1 else ""
            raise _Misfit(misfit.args[0], misfit.args[1] + where) from None
    return make(entries)


def _as_bool(value: Any) -> bool | None:
    word = str(value).strip().lower() if isinstance(value, (str, int)) else None
    return True if word in _TRUE else False if word in _FALSE else None


def _as_int(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:  # such as 1e3, or more digits than Python reads
            pass
    number = value if isinstance(value, int) else _as_float(value)
    whole = number is not None and not isinstance(value, bool) and number == int(number)
    return int(number) if whole else None


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real, Decimal)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        raise _Misfit("must be a finite number", shown(value))
    return value if isinstance(value, int) else number


def _as_text(value: Any) -> str | None:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Misfit("is not valid Unicode text", shown(value)) from None
    if "\0" in value:
        raise _Misfit("must not hold a null character", shown(value))
    return str(value)


def shown(value: Any) -> str:
    """A value as a message shows it: texts and numbers cut short, of anything else the type."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else f"{value[:76]!r}..."
    if value is None or isinstance(value, (float, Decimal)):
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**80 else "of more than 80 digits"
    return f"({type(value).__name__})"


def parse_dataclass(
    kind: type[Arguments],
    description: str | None = None,
    argv: list[str] | None = None,
    prog: str | None = None,
    check: Callable[[Arguments], None] | None = None,
    presets: dict[str, dict[str, Any]] | None = None,
    positional: str | None = None,
    fixed: dict[str, str] | None = None,
) -> Arguments:
    """Reads a command line into a dataclass; its types are checked by [`check_values`], its values by `__post_init__`.

    `--config FILE` reads options from a YAML file, a key for each, which the command line replaces. A list option that
    is given several times on the command line is extended. In names `_` and `-` count alike.

    Args:
        kind (`type`): The dataclass; a field's `help` metadata is its help.
        description (`str`, *optional*): Head of `--help`.
        argv (`list[str]`, *optional*): The words; those of the process by default.
        prog (`str`, *optional*): Name of the program in messages.
        check (`Callable`, *optional*): Checks what lies outside the arguments: files, folders, models.
        presets (`dict[str, dict]`, *optional*): Values that `--preset NAME` puts in place of the defaults; the
            dataclass then has a field `preset`.
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
        values = {**config, **check_values(kind, given)}
        if presets:
            preset = values.get("preset", declared_options(kind)["preset"].default)
            values = {**presets.get(preset, {}), **values}
        arguments = build_options(kind, values)
        if check is not None:
            check(arguments)
    except (ValueError, OSError, RecursionError) as error:
        logger.debug("where it happened:", exc_info=True)
        parser.error(" ".join(str(error).split()) or type(error).__name__)
    return arguments


def _make_parser(kind: type, description: str | None, prog: str | None) -> tuple[ArgumentParser, dict[str, None]]:
    """The parser, which leaves out what is not given and converts nothing, and the names that it knows."""
    parser = ArgumentParser(
        prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS
    )
    tell_errors_in_one_line(parser)
    names, sections = {}, {}
    essential = lambda item: not (item.default is MISSING or item.facts.get("essential", False))  # noqa: E731
    for item in sorted(declared_options(kind).values(), key=essential):
        title = item.title if essential(item) else None
        if title is not None and title not in sections:
            sections[title] = parser.add_argument_group(title)
        section = sections.get(title, parser)
        help = item.facts.get("help", "")
        if item.default not in (MISSING, None, "", [], ()):
            text = " ".join(map(str, item.default)) if isinstance(item.default, (list, tuple)) else item.default
            help += f" (default: {text})"
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
            section.add_argument(f"--no_{item.name}", action="store_false", dest=item.name, help="Turns it off.")
    parser.add_argument(
        "--config",
        help="YAML file with options, a key for each. What is given on the command line replaces the file's value; a "
        "list option that is given several times on the command line is extended.",
    )
    parser.add_argument("--version", action="version", version=f"diffusers-safe {package_version()}")
    return parser, {**names, "config": None, "version": None, "help": None}


def _with_underscores(word: str, names: Iterable[str]) -> str:
    """`--max-train-steps=3` as `--max_train_steps=3`, if it is the name of an option."""
    name, equals, value = word.partition("=")
    known = name[2:].replace("-", "_")
    return f"--{known}{equals}{value}" if name.startswith("--") and known in names else word


def _unrecognized(words: list[str], names: Iterable[str]) -> str:
    """Unknown options, without values, which may be secret, and the options that were probably meant."""
    options = [word for word in words if word[:1] in ("-", "–", "—")]
    return " ".join(suggested(word.partition("=")[0], names) for word in options or words)


def suggested(word: str, names: Iterable[str], prefix: str = "--") -> str:
    """A word, with the name that was probably meant."""
    names = {name.replace("-", "_"): name for name in names}
    close = [names[name] for name in get_close_matches(word.strip("-–—'").replace("-", "_"), names, n=1, cutoff=0.7)]
    return f"{word} (did you mean {prefix}{close[0]}?)" if close else word


class TextLoader(yaml.BaseLoader):
    """Every value as text, as on a command line (`no` is a word), but null; a key is there once."""

    aliases = 0

    def compose_node(self, parent, index):
        """A few aliases (`*name`) are a convenience, many make gigabytes of a small file."""
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_YAML_ALIASES:
            raise yaml.constructor.ConstructorError(
                problem=f"more than {MAX_YAML_ALIASES} aliases", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and (name := name.replace("-", "_")) in seen:
                raise yaml.constructor.ConstructorError(problem=f"{shown(name)} twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_NULL = "tag:yaml.org,2002:null"
TextLoader.add_implicit_resolver(_NULL, re.compile("^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
TextLoader.add_constructor(_NULL, lambda loader, node: None)


def _refuse_tag(loader: TextLoader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(
        problem=f"the tag {shown(node.tag)}: values are texts, lists and mappings", problem_mark=node.start_mark
    )


for _tag, _construct in {"str": "scalar", "seq": "sequence", "map": "mapping"}.items():
    TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(TextLoader, f"construct_{_construct}"))
TextLoader.add_constructor(None, _refuse_tag)


def read_yaml(path: str | Path, name: str) -> Any:
    """Reads a YAML file: texts, `None`, lists and mappings.

    Args:
        path (`str` or `Path`): The file.
        name (`str`): What it is, for messages.

    Raises:
        `ValueError`: If it cannot be read, is larger than 16 MiB or nested too deeply, or has a key twice.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ValueError(f"{name} {path}: is larger than {MAX_YAML_BYTES >> 20} MiB")
        return yaml.load(data.decode("utf-8-sig"), TextLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or type(error).__name__
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else reason
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
        mark = getattr(error, "problem_mark", None)  # the line's text may hold a secret
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name} {path}: cannot be read as YAML ({reason}{where})") from None


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
        if (found := options.pop(name, value)) != value:
            raise ValueError(f"config {path}: {name} is {found}, here it must be {value}")
    names = declared_options(kind)
    if unknown := [name for name in options if name not in names]:
        told = " ".join(suggested(f"--{name}", names) for name in unknown)
        raise ValueError(f"config {path}: unrecognized arguments: {told}")
    try:
        return check_values(kind, {name: value for name, value in options.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from None


def package_version() -> str:
    try:
        return version("diffusers-safe")
    except PackageNotFoundError:
        return "(not installed)"


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def note(message: str, *args: Any) -> None:
    """Prints a note on stderr, from one process of those that were launched together."""
    if is_first_process():
        logger.warning(message, *args)


def tell_errors_in_one_line(parser: ArgumentParser) -> None:
    """One line from one process, instead of argparse's page of usage from each; and options by their full names."""

    def error(message: str) -> None:
        line = f"{parser.prog}: error: {message}\n".encode("utf-8", "backslashreplace").decode()
        parser.exit(2, line if is_first_process() else None)

    parser.error, parser.allow_abbrev = error, False


@contextmanager
def exit_with_error() -> Iterator[None]:
    """Ends the program with one line and code 1 where the work meets bad input (`ValueError`), a file that cannot be
    read or written (`OSError`) or numbers that have gone astray (`FloatingPointError`); silently, as `cat` does, where
    the reader of its output has gone (`| head -1`). An error may have an `exit_code` of its own."""
    try:
        try:
            with disk_errors("a file"):
                yield
        finally:
            sys.stdout.flush()
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
