"""Warnings about parts of a list that are not used or used twice, because results depend on them."""

import logging
import math
from collections.abc import Sequence

from ...concepts import is_visible
from ...messages import is_first_process
from ..generate import PromptRow
from .columns import given, text_of
from .layouts import LIKE_A_SETTING, MISSING, column_key, is_index


logger = logging.getLogger(__name__)
_MOST = 10  # rows that a message lists


def with_prompts(numbered: list[tuple[int, dict]], column: str, where: str) -> list[tuple[int, dict]]:
    """The rows that have a prompt; the others are reported."""
    kept = [(number, record) for number, record in numbered if not _is_blank(record.get(column))]
    if not kept:
        raise ValueError(f"{where}: no row has text in the column '{column}'")
    if blank := [number + 1 for number, record in numbered if _is_blank(record.get(column))]:
        _report(f"{where}: left out {_count(blank, 'row')} without a prompt ({_listed(blank)})")
    return kept


def _is_blank(prompt: object) -> bool:
    if isinstance(prompt, str):
        return not is_visible(prompt) or prompt.strip() in MISSING
    return prompt is None or (isinstance(prompt, float) and math.isnan(prompt))


def report_renamed(where: str, column: str | None, renamed: Sequence[tuple[int, str]]) -> None:
    """Warns of rows that do not get the name in their column, because an earlier row has it."""
    if renamed:
        number, name = renamed[0]
        _report(
            f"{where}: {_count(renamed, 'row')} with the {column} of an earlier row; the images of row {number} are"
            f" named '{name}'" + (", and so on" if len(renamed) > 1 else "")
        )


def report_unused(
    where: str, records: Sequence[dict], columns: Sequence[str], settings: dict[str, list[str]], row_settings: bool
) -> None:
    """Warns of columns that look like settings of images and are not used."""
    used = {column for own in settings.values() for column in own}
    counting = {setting: own for setting, own in settings.items() if own and (row_settings or setting == "seed")}
    for own in counting.values():
        for column in own[1:]:
            values = [(given(record, own[0]), given(record, column)) for record in records]
            differ = [n for n, (a, b) in enumerate(values, 1) if None not in (a, b) and _plain(a) != _plain(b)]
            if differ:
                _report(
                    f"{where}: the columns '{own[0]}' and '{column}' differ in {_count(differ, 'row')}"
                    f" ({_listed(differ)}); '{own[0]}' is used"
                )
    unused = [c for c in columns if c not in used and LIKE_A_SETTING.fullmatch(column_key(c)) and not is_index(c)]
    if unused := [column for column in unused if any(given(record, column) is not None for record in records)]:
        names = ", ".join(f"'{column}'" for column in unused)
        taken = ", ".join(f"{setting} from '{own[0]}'" for setting, own in counting.items()) or "none"
        verb = "looks like a setting of images and is" if len(unused) == 1 else "look like settings of images and are"
        _report(f"{where}: the column{'s' if len(unused) > 1 else ''} {names} {verb} not used; used are {taken}")


def _plain(value: object) -> str:
    return text_of(value).removesuffix(".0")


def report_missing_seeds(where: str, numbered: Sequence[tuple[int, dict]], columns: list[str], seed: int) -> None:
    missing = [number + 1 for number, record in numbered if all(given(record, c) is None for c in columns)]
    if columns and missing:
        rows = f"{_count(missing, 'row')} without a value in '{columns[0]}' ({_listed(missing)})"
        _report(f"{where}: {rows}, seed {seed} is used")


def report_repeated(where: str, rows: Sequence[PromptRow], numbers: Sequence[int]) -> None:
    """Warns of images that equal an earlier one."""
    first: dict[tuple, int] = {}
    repeated = []
    for row, number in zip(rows, numbers):
        image = (row.prompt, row.seed, row.guidance_scale, row.height, row.width)
        if image in first:
            repeated.append((number, first[image]))
        first.setdefault(image, number)
    if repeated:
        _report(
            f"{where}: {len(repeated)} of {len(rows)} images have the prompt and seed of an earlier one (the first:"
            f" row {repeated[0][0]}, as row {repeated[0][1]}) and are therefore the same image. N counts them: of"
            f" N={len(rows)} only {len(first)} are different, and intervals are too narrow"
        )


def _report(message: str) -> None:
    if is_first_process():
        logger.warning(message)


def _count(things: Sequence, noun: str) -> str:
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_MOST])) + (", ..." if len(numbers) > _MOST else "")
    return f"row{'s' if len(numbers) != 1 else ''} {shown}"
