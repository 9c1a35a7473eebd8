"""What a report of an evaluation is made of, for one model or for many, and `results.json`; `page.py` makes the page.

A report knows nothing of what was measured; it gets titles, numbers and pictures, of each model in the order of
`models`:

    report = Report(
        title="weapon, erased",
        summary="What SDD did to the embedded model.",
        models=("before", "after"),
        headline=[Headline("weapon recognised", [rate_before, rate_after], "gone", better="lower")],
        sections=[
            Comparison("Every prompt", [("a knife", [knife_before, knife_after])], "gone"),
            Grid("Same seeds", [Strip("a knife", [Shot(image_before), Shot(image_after)])], "gone"),
        ],
        protocol={"steps": 25},
    )
    write_report(folder, results, report)
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

import numpy as np

from ..provenance import write_text
from .statistics import Estimate


LIMITS = (
    "Erasure is not a guarantee: other wordings or languages, input images or fine-tuning can bring the concept back.",
    "A rate of 0 in a sample is not a rate of 0: the upper end of its interval is what the sample allows to claim.",
    "A classifier judged these images, and it errs too. Look at the pictures.",
    "Numbers made with another protocol (model, prompts, seeds, sampler, judge) cannot be compared with these.",
)
TONES = ("gone", "kept")
RESULTS_NAME, PAGE_NAME = "results.json", "report.html"


@dataclass(frozen=True)
class Change:
    """How a model differs from the first one on the same prompts and seeds.

    Attributes:
        estimate ([`Estimate`]): Of the difference.
        p_value (`float`, *optional*): Of a paired test.
        test (`str`, *optional*): Its name.
    """

    estimate: Estimate
    p_value: float | None = None
    test: str | None = None

    def __str__(self) -> str:
        if self.p_value is None:
            return f"{self.estimate.headline} {self.estimate.interval}"
        told = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        return f"{self.estimate.headline} {self.estimate.interval}, {told}"

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out, and the test, if there is one, agrees."""
        leaves_out = self.estimate.low > 0 or self.estimate.high < 0
        return leaves_out and (self.p_value is None or self.p_value < 0.05)


@dataclass(frozen=True)
class Headline:
    """A number that a reader sees first, of each model.

    Attributes:
        label (`str`): What was measured.
        estimates (`Sequence[Estimate | None]`): Of each model; `None` where it has none, as the first model where it
            is what others are compared with.
        tone (`str`): Its colour: `"gone"` for what should fall, `"kept"` for what should stay.
        note (`str`, defaults to `""`): One more sentence.
        better (`str`, *optional*): `"lower"` or `"higher"`; the best model is marked.
        changes (`Sequence[Change | None]`): Of each model against the first; empty where that was not asked.
    """

    label: str
    estimates: Sequence[Estimate | None]
    tone: str
    note: str = ""
    better: str | None = None
    changes: Sequence[Change | None] = ()

    @property
    def best(self) -> list[int]:
        """Which models have the best value, if one of at least two is better than another."""
        values = [estimate.value for estimate in self.estimates if estimate is not None]
        if self.better is None or len(set(values)) < 2:
            return []
        best = min(values) if self.better == "lower" else max(values)
        return [i for i, estimate in enumerate(self.estimates) if estimate is not None and estimate.value == best]


@dataclass(frozen=True)
class Comparison:
    """A table of rates of each model, with bars from 0 to 100 % and intervals.

    Attributes:
        title (`str`): Its heading.
        rows (`list[tuple[str, Sequence[Estimate | None]]]`): Label, and the rate of each model.
        tone (`str`): `"gone"` or `"kept"`.
        note (`str`, defaults to `""`): What to know before reading it.
    """

    title: str
    rows: list[tuple[str, Sequence[Estimate | None]]]
    tone: str
    note: str = ""


@dataclass(frozen=True)
class Shot:
    """One model's image.

    Attributes:
        image (`np.ndarray`): `(H, W, 3)`, `uint8`.
        note (`str`, defaults to `""`): Stands below it, such as what a classifier saw.
        missed (`bool`, defaults to `False`): Marks an image that is not as it should be.
        blurred (`bool`, defaults to `False`): Blurred until a reader asks for it.
        flagged (`bool`, defaults to `False`): Shows what was to go.
    """

    image: np.ndarray
    note: str = ""
    missed: bool = False
    blurred: bool = False
    flagged: bool = False


@dataclass(frozen=True)
class Strip:
    """The same prompt and seed, drawn by each model.

    Attributes:
        caption (`str`): Usually the prompt.
        shots (`Sequence[Shot]`): Of each model.
    """

    caption: str
    shots: Sequence[Shot]


@dataclass(frozen=True)
class Grid:
    """Strips of images under one heading.

    Attributes:
        title (`str`): Its heading.
        strips (`list[Strip]`): In order.
        tone (`str`): `"gone"` or `"kept"`.
        note (`str`, defaults to `""`): What to know before looking.
        side (`int`, defaults to 128): Pixels of the longer side of an embedded image. Above 128 they are JPEGs, which
            are smaller; metrics never see these.
    """

    title: str
    strips: list[Strip]
    tone: str
    note: str = ""
    side: int = 128


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title (`str`): Its heading.
        columns (`Sequence[str]`): Their heads.
        groups (`list[tuple[str, list[Sequence[str]]]]`): Rows under a heading of their own, `""` for none. A last
            word that is an `https` address becomes a link.
        note (`str`, defaults to `""`): What to know before reading it.
        own (`frozenset[tuple[str, int]]`): Rows, by the group's heading and their number, which stand out.
        merged (`bool`, defaults to `False`): What neighbouring rows say alike, from the third column on, is said once.
    """

    title: str
    columns: Sequence[str]
    groups: list[tuple[str, list[Sequence[str]]]]
    note: str = ""
    own: frozenset = frozenset()
    merged: bool = False


@dataclass(frozen=True)
class Scatter:
    """Two numbers of each model against each other, with intervals as crosses.

    Attributes:
        x_label (`str`): What goes to the right.
        y_label (`str`): What goes up.
        points (`Sequence[tuple[Estimate, Estimate] | None]`): Of each model, x and y.
        better (`tuple[str, str]`): For x and y, `"lower"` or `"higher"`.
    """

    x_label: str
    y_label: str
    points: Sequence[tuple[Estimate, Estimate] | None]
    better: tuple[str, str]


@dataclass(frozen=True)
class Curves:
    """How a number of each model depends on a threshold.

    Attributes:
        x_label (`str`): The threshold.
        y_label (`str`): The number.
        lines (`Sequence[Sequence[tuple[float, Estimate]]]`): Of each model, in the order of thresholds.
        at (`float`, *optional*): The threshold of the other numbers of the page.
    """

    x_label: str
    y_label: str
    lines: Sequence[Sequence[tuple[float, Estimate]]]
    at: float | None = None


@dataclass(frozen=True)
class Plots:
    """Plots beside each other under one heading."""

    title: str
    plots: Sequence[Scatter | Curves]
    note: str = ""


Section = Comparison | Grid | Table | Plots


@dataclass(frozen=True)
class Report:
    """A whole page, shown in the order of the attributes.

    Attributes:
        title (`str`): Of the page.
        summary (`str`): One or two sentences below it.
        models (`Sequence[str]`): Their names; the first is what others are compared with.
        headline (`list[Headline]`): The numbers that matter.
        sections (`list[Section]`): Tables, plots and pictures, in any order.
        protocol (`dict[str, object]`): Name -> value of everything needed to repeat it: settings, seeds, fingerprints.
        limits (`tuple[str, ...]`, *optional*): What the numbers do not say.
        warnings (`tuple[str, ...]`, *optional*): What spoils these numbers; stands above them.
    """

    title: str
    summary: str
    models: Sequence[str]
    headline: list[Headline]
    sections: list[Section]
    protocol: dict[str, object]
    limits: tuple[str, ...] = LIMITS
    warnings: tuple[str, ...] = ()

    def __post_init__(self):
        for part in [*self.headline, *self.sections]:
            if getattr(part, "tone", TONES[0]) not in TONES:
                raise ValueError(f'tone is "{part.tone}"; allowed are {", ".join(TONES)}')
            for count in _widths(part):
                if count != len(self.models):
                    told = getattr(part, "label", None) or part.title
                    raise ValueError(f"{told}: has {count} entries for {len(self.models)} models; needs one for each")


def _widths(part: Headline | Section) -> list[int]:
    """How many models each row of a part has."""
    if isinstance(part, Headline):
        return [len(part.estimates), *([len(part.changes)] if part.changes else [])]
    if isinstance(part, Comparison):
        return [len(estimates) for _, estimates in part.rows]
    if isinstance(part, Grid):
        return [len(strip.shots) for strip in part.strips]
    if isinstance(part, Plots):
        return [len(plot.points if isinstance(plot, Scatter) else plot.lines) for plot in part.plots]
    return []


def write_results(folder: str | Path, results: dict) -> Path:
    """Writes `results.json`: everything measured, of what JSON knows, NumPy numbers and the dataclasses here.

    Raises:
        `ValueError`: If a number is not finite.
        `TypeError`: If a value does not fit into JSON.
    """
    path = Path(folder) / RESULTS_NAME
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False, default=_to_json) + "\n")
    return path


def headline_table(results: dict, changes: bool = True, turned: bool = False) -> str:
    """The headline of a `results.json`, read back, as a Markdown table as papers have it: a row a model, a column a
    measure, with 95 % intervals and an arrow to where better is. Notes and warnings come below.

    Args:
        results (`dict`): As read from the file.
        changes (`bool`, defaults to `True`): Whether a cell has the difference to the first model in parentheses.
        turned (`bool`, defaults to `False`): A row a measure, a column a model: of few models the table that fits into
            a terminal.

    Raises:
        `ValueError`: If it has none.
    """
    try:
        columns = [["", *results["headline"]["models"]]]
        measures = results["headline"]["rows"]
        columns += [_column(measure, changes) for measure in measures]
        notes = [f"* {measure['label']}: {measure['note']}" for measure in measures if measure["note"]]
        notes += [f"* Warning: {warning}" for warning in results.get("warnings", [])]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the results have no headline as evaluations write it ({error!r})") from None
    lines = columns if turned else list(zip(*columns))
    head, *rows = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    table = [f"| {head} |", "|---" * len(lines[0]) + "|", *(f"| {row} |" for row in rows)]
    return "\n".join([*table, *([""] if notes else []), *notes])


def _column(measure: dict, changes: bool) -> list[str]:
    """A measure's cells; N stands in its head if it is the same for all models."""
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


def _to_json(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} does not fit into JSON")
