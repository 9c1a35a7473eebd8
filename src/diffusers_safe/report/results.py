"""The files of a report: `results.json`, `results.md` and `report.html`, and the results read back."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np

from ..output_folders import prepare_files
from ..provenance import write_text
from .elements import Change, Report
from .page import render_page, render_table
from .statistics import Estimate


RESULTS_NAME, PAGE_NAME, TABLE_NAME = "results.json", "report.html", "results.md"


class Results(dict):
    """What `results.json` holds. Notebooks show its headline table."""

    def _repr_html_(self) -> str | None:
        return render_table(*headline_cells(self)) if "headline" in self else None


def publish(
    folder: str | Path,
    results: dict,
    report: Report,
    describe: Callable[[dict], tuple[str, Sequence[str]]] = lambda results: ("", ()),
) -> Results:
    """Writes `results.json`, `report.html` and `results.md`, each complete or not at all.

    Args:
        folder (`str` or `Path`): Output folder.
        results (`dict`): Everything that was measured: JSON values, NumPy numbers and dataclasses. The report's
            headline, warnings and numbers of images are added.
        report (`Report`): The page.
        describe (`Callable`, *optional*): Takes the results that were written, and returns the text of `results.md`:
            how to read the headline table, and the lines after it.

    Returns:
        `Results`: What `results.json` holds, read back.

    Raises:
        `ValueError`: If a number is not finite. Nothing is written then.
        `TypeError`: If a value cannot be written as JSON.
    """
    folder, page = Path(folder), render_page(report)
    headline = {"models": list(report.models), "rows": report.headline}
    written = {**results, "report": report.image_counts, "headline": headline, "warnings": report.warnings}
    text = _to_text(written)
    prepare_files(folder, RESULTS_NAME, PAGE_NAME, TABLE_NAME)
    write_text(folder / RESULTS_NAME, text)
    write_text(folder / PAGE_NAME, page)
    results = Results(json.loads(text))
    note, details = describe(results)
    lines = [f"# {report.title}", "", headline_table(results), "", note, "", *details]
    write_text(folder / TABLE_NAME, "\n".join(lines).rstrip() + "\n")
    return results


def write_results(folder: str | Path, results: dict) -> Path:
    """Writes `results.json`: JSON values, NumPy numbers and dataclasses.

    Raises:
        `ValueError`: If a number is not finite.
        `TypeError`: If a value cannot be written as JSON.
    """
    path = Path(folder) / RESULTS_NAME
    write_text(path, _to_text(results))
    return path


def headline_table(results: dict, changes: bool = True, turned: bool = False) -> str:
    """The headline of a `results.json` as a Markdown table in the form used by papers: a row for each model, a column
    for each measure, with 95 % intervals and an arrow to the better direction. Notes and warnings follow below.

    Args:
        results (`dict`): As read from the file.
        changes (`bool`, defaults to `True`): Add the difference to the first model in parentheses.
        turned (`bool`, defaults to `False`): A row for each measure and a column for each model, which fits into a
            terminal if there are few models.

    Raises:
        `ValueError`: If the results have no headline.
    """
    table, notes = headline_cells(results, changes)
    lines = list(zip(*table)) if turned else table
    head, *rows = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    table = [f"| {head} |", "|---" * len(lines[0]) + "|", *(f"| {row} |" for row in rows)]
    return "\n".join([*table, *([""] if notes else []), *(f"* {note}" for note in notes)])


def headline_cells(results: dict, changes: bool = True) -> tuple[list[tuple[str, ...]], list[str]]:
    """The headline of a `results.json`: the rows of its table, the first of them the head, and notes and warnings.

    Raises:
        `ValueError`: If the results have no headline.
    """
    try:
        measures = results["headline"]["rows"]
        columns = [["", *results["headline"]["models"]], *(_column(measure, changes) for measure in measures)]
        notes = [f"{measure['label']}: {measure['note']}" for measure in measures if measure["note"]]
        notes += [f"Warning: {warning}" for warning in results.get("warnings", [])]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the results have no headline as evaluations write it ({error!r})") from None
    return list(zip(*columns)), notes


def _column(measure: dict, changes: bool) -> list[str]:
    """The cells of a measure. N is in the head if it is the same for all models."""
    estimates = [estimate and Estimate(**estimate) for estimate in measure["estimates"]]
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[measure["better"]]
    counts = {estimate.n for estimate in estimates if estimate}
    count = f", N={counts.pop()}" if len(counts) == 1 else ""
    cells = [""] * len(estimates)
    for place, estimate in enumerate(estimates):
        if estimate:
            cells[place] = f"{estimate.headline} {estimate.interval}" if count else str(estimate)
        if changes and measure["changes"] and (change := measure["changes"][place]):
            cells[place] += f" ({Change(**{**change, 'estimate': Estimate(**change['estimate'])})})"
    return [f"{measure['label']}{arrow}{count}", *cells]


def _to_text(results: dict) -> str:
    return json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False, default=_to_json) + "\n"


def _to_json(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} cannot be written as JSON")
