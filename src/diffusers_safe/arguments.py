"""Options: declared with their limits, in groups, and checked by one function for Python, YAML and command lines."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache, wraps
from typing import Any, ClassVar, TypeVar, get_type_hints

from .values import LIMITS, check_value, suggested


Arguments = TypeVar("Arguments")


def option(default: Any, help: str, choices: Iterable[str | None] | None = None, **facts: Any) -> Any:
    """Declares an option: a field of a dataclass with the line that `--help` shows and the values that are allowed.

    Args:
        default (`Any`): Its default; a list is copied for each instance.
        help (`str`): One line. [`OptionGroups.helps`] replaces it where it depends on the job.
        choices (`Iterable[str]`, *optional*): The allowed texts.
        facts: Limits of a number (`at_least`, `above`, `at_most`, `below`); `essential=True` shows the option first in
            `--help`; `recorded=False` keeps it out of records; `may_change=True` lets a resumed run change it;
            `secret=True` keeps it out of `repr`.
    """
    metadata = {"help": help, "choices": choices, **facts}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, repr=not facts.get("secret", False), metadata=metadata)


def required(help: str, **facts: Any) -> Any:
    """An [`option`] without a default."""
    return field(metadata={"help": help, **facts})


def group(title: str, first: bool = False) -> Any:
    """Declares a field that holds a dataclass of options; on command lines and in files their names stand alone.

    Args:
        title (`str`): Of the section in `--help`.
        first (`bool`, defaults to `False`): Show it before other groups.
    """
    return field(metadata={"group": title, "first": first})


@dataclass(frozen=True)
class Declared:
    """What is declared of an option.

    Attributes:
        name (`str`): On command lines and in files.
        kind (`Any`): Its type.
        default (`Any`): `MISSING` if it is required.
        facts (`Mapping[str, Any]`): As in [`option`].
        place (`str`, *optional*): The field of the group that holds it.
        title (`str`, *optional*): The title of that group, or `TITLE` of the class that declares the option.
        first (`bool`): Whether that group comes first in `--help`.
    """

    name: str
    kind: Any
    default: Any
    facts: Mapping[str, Any]
    place: str | None = None
    title: str | None = None
    first: bool = False


@cache
def declared_options(kind: type) -> dict[str, Declared]:
    """All options of a dataclass by name, those of its groups included."""
    hints, found = _type_hints(kind), {}
    for item in fields(kind):
        if "group" in item.metadata:
            for inner in declared_options(hints[item.name]).values():
                if inner.name in found:
                    raise ValueError(
                        f"option '{inner.name}' of {hints[item.name].__name__}: is declared elsewhere, too"
                    )
                found[inner.name] = replace(
                    inner, place=item.name, title=item.metadata["group"], first=item.metadata["first"]
                )
        elif item.init:
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            owner = next(part for part in reversed(kind.__mro__) if item.name in vars(part).get("__annotations__", {}))
            title = vars(owner).get("TITLE")
            found[item.name] = Declared(item.name, hints[item.name], default, item.metadata, title=title)
    for name, default in getattr(kind, "DEFAULTS", {}).items():
        found[name] = replace(found[name], default=default)
    for name, help in kind.helps().items() if issubclass(kind, OptionGroups) else ():
        found[name] = replace(found[name], facts={**found[name].facts, "help": help})
    return found


def build_options(kind: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """Makes a dataclass of options, with its groups, from values by name; values of the preset are used for options
    that are not given.

    Raises:
        `ValueError`: If a name is unknown, a value does not fit, or a required option is missing.
    """
    declared = declared_options(kind)
    values = _without_removed(kind, values)
    if unknown := [suggested(name, declared, "") for name in sorted(values.keys() - declared.keys())]:
        raise ValueError(f"{', '.join(unknown)}: no such option")
    if presets := getattr(kind, "PRESETS", {}):
        preset = check_values(kind, {"preset": values.get("preset", declared["preset"].default)})["preset"]
        values = {**presets.get(preset, {}), **values}
    if missing := [name for name, item in declared.items() if item.default is MISSING and name not in values]:
        raise ValueError(f"the following arguments are required: {', '.join(f'--{name}' for name in missing)}")
    values = {**getattr(kind, "DEFAULTS", {}), **check_values(kind, values)}
    groups = {item.name: {} for item in fields(kind) if "group" in item.metadata}
    own = {}
    for name, value in values.items():
        place = declared[name].place
        (own if place is None else groups[place])[name] = value
    hints = _type_hints(kind)
    return kind(**own, **{name: hints[name](**inner) for name, inner in groups.items()})


def _without_removed(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without options of earlier versions, which may have their old defaults only."""
    removed = getattr(kind, "REMOVED", {})
    for name in values.keys() & removed.keys():
        if check_value(name, values[name], type(removed[name])) != removed[name]:
            raise ValueError(f"{name} {values[name]}: was removed; allowed is {removed[name]}, or to leave it out")
    return {name: value for name, value in values.items() if name not in removed}


class OptionGroups:
    """Base class of dataclasses whose options are in groups.

    Attributes:
        DEFAULTS (`dict[str, Any]`): Defaults that differ from those of the groups.
        PRESETS (`dict[str, dict[str, Any]]`): Values by the name that the option `preset` takes.
        REMOVED (`dict[str, Any]`): Options of earlier versions, with the only values that are still accepted.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    REMOVED: ClassVar[dict[str, Any]] = {}

    @classmethod
    def helps(cls) -> dict[str, str]:
        """Lines of `--help` by option, where those of the groups do not describe what this job accepts."""
        return {}

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
        for name, value in values.items():
            optional = name in declared and declared[name].kind == (str | None) and "help" in declared[name].facts
            if optional and isinstance(value, str) and not value.strip():
                raise ValueError(f"{name} {value!r}: is empty; give a value, or leave the option out")
        return {
            name: check_value(name, value, declared[name].kind, **_allowed(declared[name].facts))
            if name in declared
            else value
            for name, value in values.items()
        }
    hints = _type_hints(target)
    return {name: check_value(name, value, hints[name]) if name in hints else value for name, value in values.items()}


def _allowed(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("choices", *LIMITS) if name in facts}


@cache
def _type_hints(target: Callable) -> dict[str, Any]:
    """The types of the parameters that are given by name."""
    function = target.__init__ if isinstance(target, type) else target
    hints = get_type_hints(function)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = inspect.signature(function).parameters.values()
    return {item.name: hints[item.name] for item in known if item.name in hints and item.kind not in variable}
