"""The columns of a list and the values of its cells."""

import math
from collections.abc import Sequence

from .layouts import SETTINGS, column_key


def find_column(name: str, columns: Sequence[str]) -> str | None:
    """The column with this name, or with a name that differs only in case and punctuation."""
    return name if name in columns else next((c for c in columns if column_key(c) == column_key(name)), None)


def setting_columns(columns: Sequence[str]) -> dict[str, list[str]]:
    """Setting -> the columns that hold it, the preferred one first."""
    return {
        setting: sorted((c for c in columns if column_key(c) in known), key=lambda c: known.index(column_key(c)))
        for setting, known in SETTINGS.items()
    }


def given(record: dict, column: str | None) -> object | None:
    """The value of a cell, `None` if it is blank."""
    value = None if column is None else record.get(column)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return None if blank or (isinstance(value, float) and math.isnan(value)) else value


def text_of(value: object) -> str:
    """The text of a cell; whole numbers without the `.0` that tables add."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def number_in(record: dict, column: str, kind: type) -> float | int | None:
    """The value of a cell as a number. Whole numbers are not converted to floats, which would round large seeds."""
    value = given(record, column)
    if value is None:
        return None
    text = text_of(value)
    try:
        number = int(text.removesuffix(".0")) if kind is int else float(text)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or "_" in text or not math.isfinite(number):
        raise ValueError(f"{column} '{text}' is not a {'whole ' if kind is int else ''}number")
    return number
