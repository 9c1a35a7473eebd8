"""The parts of a report on one model or on many. `page.py` renders them, `results.py` writes the files.

A report does not know what was measured. It is given titles, numbers and images, one of each model in the order of
`models`:

    report = Report(
        title="weapon, erased",
        summary="The embedded model before and after SDD.",
        models=("before", "after"),
        headline=[Headline("weapon recognised", [rate_before, rate_after], "gone", better="lower")],
        sections=[
            Comparison("Every prompt", [("a knife", [knife_before, knife_after])], "gone"),
            Grid("Same seeds", [Strip("a knife", [Shot(image_before), Shot(image_after)])], "gone"),
        ],
        protocol={"steps": 25},
    )
    publish(folder, results, report)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .statistics import Estimate


LIMITS = (
    "Erasure is not a guarantee: other wordings or languages, input images or fine-tuning can bring the concept back.",
    "A rate of 0 in a sample is not a rate of 0: the upper end of its interval is what the sample supports.",
    "A classifier judged these images, and it makes mistakes too. Look at the images.",
    "Numbers made with another protocol (model, prompts, seeds, sampler, judge) cannot be compared with these.",
)
TONES = ("gone", "kept")  # colours: the erased concept, other concepts
SMALL_SIDE, LARGE_SIDE = 128, 256  # pixels of the longer side of an embedded image


@dataclass(frozen=True)
class Change:
    """How a model differs from the first one on the same prompts and seeds.

    Attributes:
        estimate ([`Estimate`]): The difference.
        p_value (`float`, *optional*): p-value of a paired test.
        test (`str`, *optional*): Name of the test.
    """

    estimate: Estimate
    p_value: float | None = None
    test: str | None = None

    def __str__(self) -> str:
        if self.p_value is None:
            return f"{self.estimate.headline} {self.estimate.interval}"
        p_value = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        return f"{self.estimate.headline} {self.estimate.interval}, {p_value}"

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0 and the test, if there is one, agrees."""
        excludes_zero = self.estimate.low > 0 or self.estimate.high < 0
        return excludes_zero and (self.p_value is None or self.p_value < 0.05)


@dataclass(frozen=True)
class Headline:
    """A number that a reader sees first, for each model.

    Attributes:
        label (`str`): What was measured.
        estimates (`Sequence[Estimate | None]`): One for each model; `None` where a model has none, such as the first
            model of a metric that compares with it.
        tone (`str`): `"gone"` for the erased concept, `"kept"` for other concepts.
        note (`str`, defaults to `""`): One more sentence.
        better (`str`, *optional*): `"lower"` or `"higher"`; the best model is marked.
        changes (`Sequence[Change | None]`): Difference of each model to the first; empty if not computed.
    """

    label: str
    estimates: Sequence[Estimate | None]
    tone: str
    note: str = ""
    better: str | None = None
    changes: Sequence[Change | None] = ()

    @property
    def best(self) -> list[int]:
        """Indices of the models with the best value, if at least two values differ."""
        values = [estimate.value for estimate in self.estimates if estimate is not None]
        if self.better is None or len(set(values)) < 2:
            return []
        best = min(values) if self.better == "lower" else max(values)
        return [i for i, estimate in enumerate(self.estimates) if estimate is not None and estimate.value == best]

    def verdict(self, place: int) -> str:
        """`"good"` or `"bad"` if a model clearly differs from the first one, else `"soft"`."""
        change = self.changes[place]
        if not change.is_clear or self.better is None:
            return "soft"
        return "good" if (change.estimate.value < 0) == (self.better == "lower") else "bad"


@dataclass(frozen=True)
class Comparison:
    """A table of rates with bars from 0 to 100 % and intervals.

    Attributes:
        title (`str`): Heading.
        rows (`list[tuple[str, Sequence[Estimate | None]]]`): Label, and the rate of each model.
        tone (`str`): `"gone"` or `"kept"`.
        note (`str`, defaults to `""`): Text below the heading.
    """

    title: str
    rows: list[tuple[str, Sequence[Estimate | None]]]
    tone: str
    note: str = ""


@dataclass(frozen=True)
class Shot:
    """An image of one model.

    Attributes:
        image (`np.ndarray`): `(H, W, 3)`, `uint8`.
        note (`str`, defaults to `""`): Caption, such as what a classifier recognised.
        missed (`bool`, defaults to `False`): Marks an image that is not as it should be.
        blurred (`bool`, defaults to `False`): Blurred until the reader clicks it.
        flagged (`bool`, defaults to `False`): Shows the erased concept.
    """

    image: np.ndarray
    note: str = ""
    missed: bool = False
    blurred: bool = False
    flagged: bool = False


@dataclass(frozen=True)
class Strip:
    """The images of all models for the same prompt and seed.

    Attributes:
        caption (`str`): Usually the prompt.
        shots (`Sequence[Shot]`): One for each model.
    """

    caption: str
    shots: Sequence[Shot]


@dataclass(frozen=True)
class Grid:
    """Strips of images under one heading.

    Attributes:
        title (`str`): Heading.
        strips (`list[Strip]`): In order.
        tone (`str`): `"gone"` or `"kept"`.
        note (`str`, defaults to `""`): Text below the heading.
    """

    title: str
    strips: list[Strip]
    tone: str
    note: str = ""

    @property
    def shots(self) -> list[Shot]:
        return [shot for strip in self.strips for shot in strip.shots]

    @property
    def is_large(self) -> bool:
        """Whether an image has more than 128 pixels. All are then embedded as JPEGs of up to 256 pixels, else as PNGs
        of 128."""
        return any(max(shot.image.shape[:2]) > SMALL_SIDE for shot in self.shots)

    @property
    def is_blurred(self) -> bool:
        return any(shot.blurred for shot in self.shots)


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title (`str`): Heading.
        columns (`Sequence[str]`): Names of the columns.
        groups (`list[tuple[str, list[Sequence[str]]]]`): Heading of a group (`""` for none) and its rows. A last word
            that is an `https` URL becomes a link.
        note (`str`, defaults to `""`): Text below the heading.
        own (`frozenset[tuple[str, int]]`): Highlighted rows: heading of the group and index in it.
        merged (`bool`, defaults to `False`): Merge equal cells of neighbouring rows, from the third column on.
    """

    title: str
    columns: Sequence[str]
    groups: list[tuple[str, list[Sequence[str]]]]
    note: str = ""
    own: frozenset = frozenset()
    merged: bool = False

    def cells(self, rows: list[Sequence[str]], place: int) -> Iterator[tuple[str, int]]:
        """The cells of a row after its first one, each with the number of rows it spans."""
        for column, cell in enumerate(rows[place][1:], start=1):
            may_merge = self.merged and column > 1 and cell
            if may_merge and place > 0 and rows[place - 1][column] == cell:
                continue  # the cell above spans this row
            span = 1
            while may_merge and place + span < len(rows) and rows[place + span][column] == cell:
                span += 1
            yield cell, span


@dataclass(frozen=True)
class Scatter:
    """Two numbers of each model against each other, with intervals as crosses.

    Attributes:
        x_label (`str`): Label of the x axis.
        y_label (`str`): Label of the y axis.
        points (`Sequence[tuple[Estimate, Estimate] | None]`): x and y of each model.
        better (`tuple[str, str]`): `"lower"` or `"higher"` for x and for y.
    """

    x_label: str
    y_label: str
    points: Sequence[tuple[Estimate, Estimate] | None]
    better: tuple[str, str]


@dataclass(frozen=True)
class Curves:
    """A number of each model as a function of a threshold.

    Attributes:
        x_label (`str`): The threshold.
        y_label (`str`): The number.
        lines (`Sequence[Sequence[tuple[float, Estimate]]]`): A line for each model, in ascending order of thresholds.
        at (`float`, *optional*): The threshold that the other numbers of the page use.
    """

    x_label: str
    y_label: str
    lines: Sequence[Sequence[tuple[float, Estimate]]]
    at: float | None = None


@dataclass(frozen=True)
class Plots:
    """Plots next to each other under one heading."""

    title: str
    plots: Sequence[Scatter | Curves]
    note: str = ""

    @property
    def has_curves(self) -> bool:
        return any(isinstance(plot, Curves) for plot in self.plots)


Section = Comparison | Grid | Table | Plots


@dataclass(frozen=True)
class Report:
    """A whole page, shown in the order of the attributes.

    Attributes:
        title (`str`): Title of the page.
        summary (`str`): One or two sentences below it.
        models (`Sequence[str]`): Names of the models; others are compared with the first.
        headline (`list[Headline]`): The most important numbers.
        sections (`list[Section]`): Tables, plots and images, in any order.
        protocol (`dict[str, object]`): Name -> value of everything that is needed to repeat the measurement: settings,
            seeds, fingerprints.
        limits (`tuple[str, ...]`, *optional*): What the numbers do not say.
        warnings (`tuple[str, ...]`, *optional*): What makes the numbers unreliable; shown at the top.

    Raises:
        `ValueError`: If a tone is unknown, or a part does not have one entry for each model.
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
                    name = getattr(part, "label", None) or part.title
                    raise ValueError(f"{name}: has {count} entries for {len(self.models)} models; needs one for each")

    @property
    def image_counts(self) -> dict[str, int]:
        """The number of images on the page, and of those that are flagged or blurred: such a page is not published."""
        shots = [shot for part in self.sections if isinstance(part, Grid) for shot in part.shots]
        return {"pictures": len(shots), "flagged": sum(shot.flagged or shot.blurred for shot in shots)}


def _widths(part: Headline | Section) -> list[int]:
    """The number of models in each row of a part."""
    if isinstance(part, Headline):
        return [len(part.estimates), *([len(part.changes)] if part.changes else [])]
    if isinstance(part, Comparison):
        return [len(estimates) for _, estimates in part.rows]
    if isinstance(part, Grid):
        return [len(strip.shots) for strip in part.strips]
    if isinstance(part, Plots):
        return [len(plot.points if isinstance(plot, Scatter) else plot.lines) for plot in part.plots]
    return []
