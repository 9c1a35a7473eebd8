"""Values of options: converted to their types and checked against limits."""

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin


class _Misfit(Exception):
    """A value that is not of the type; the text says what is wrong with it."""


# Upper limits by the name of an option, wherever it occurs: with more, no run could start or end.
AT_MOST = {
    "rank": 2**14,
    "resolution": 2**14,
    "height": 2**14,
    "width": 2**14,
    "resize": 2**16,
    "max_train_steps": 10**8,
    "learning_rate": 10**3,
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
    "rounds": 10**4,
    "augmentations": 10**4,
    "timeout": 86400,
    "dataloader_num_workers": 1024,
}
MAX_ENTRIES = 10**6  # of a list
LIMITS = {
    "at_least": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("less than", operator.lt),
}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


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
        if not all(LIMITS[limit][1](value, bound) for limit, bound in limits.items()):
            allowed = " and ".join(f"{LIMITS[limit][0]} {bound:,}" for limit, bound in limits.items())
            raise ValueError(f"{name} {value}: must be {allowed}")
    if choices is None or value is None:
        return value
    return (
        [choose(name, entry, choices) for entry in value] if isinstance(value, list) else choose(name, value, choices)
    )


def plain_word(value: Any) -> str:
    """A word as it is compared: without regard to case, `_` and `-`."""
    return str(value).strip().replace("_", "-").casefold()


def choose(name: str, value: str, allowed: Iterable[str | None]) -> str:
    """The one of the allowed values that is meant; `_` and `-` count alike.

    Raises:
        `ValueError`: If there is none.
    """
    known = [word for word in allowed if word is not None]
    if value in known:
        return value
    for word in known:
        if plain_word(word) == plain_word(value):
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
        if not _is_plain_number(value):
            return None
        try:
            return int(value)
        except ValueError:  # such as 1e3, or more digits than Python reads
            pass
    number = value if isinstance(value, int) else _as_float(value)
    whole = number is not None and not isinstance(value, bool) and number == int(number)
    return int(number) if whole else None


def _is_plain_number(text: str) -> bool:
    """Python also reads 1_000 and digits of other scripts."""
    return text.isascii() and "_" not in text


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real, Decimal)):
        return None
    if isinstance(value, str) and not _is_plain_number(value):
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


def suggested(word: str, names: Iterable[str], prefix: str = "--") -> str:
    """A word, with the name that was probably meant."""
    names = {name.replace("-", "_"): name for name in names}
    close = [names[name] for name in get_close_matches(word.strip("-–—'").replace("-", "_"), names, n=1, cutoff=0.7)]
    return f"{word} (did you mean {prefix}{close[0]}?)" if close else word
