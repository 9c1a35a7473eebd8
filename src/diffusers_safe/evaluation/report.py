"""Writes what an evaluation found: `results.json` for programs, and one `report.html` for people.

The page is a single file that asks nothing of the network: styles inside, images as base64 PNGs. It knows nothing of
what was measured; it gets titles, numbers and image pairs:

    report = Report(
        title="weapon, erased",
        summary="What SDD did to the embedded model.",
        headline=[Headline("weapon recognised", rate_before, rate_after, "gone")],
        sections=[
            Comparison("Every prompt", [("a knife", knife_before, knife_after)], "gone"),
            Grid("Same seeds, before and after", [Pair("a knife", image_before, image_after)], "gone"),
        ],
        protocol={"steps": 25},
    )
    write_report(folder, results, report)
"""

import base64
import io
import json
from dataclasses import asdict, dataclass, is_dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..provenance import write_text
from .statistics import Estimate


LIMITS = (
    "Erasure is not a guarantee: other wordings or languages, input images or fine-tuning can bring the concept back.",
    "A rate of 0 in a sample is not a rate of 0: the upper end of its interval is what the sample allows to claim.",
    "A classifier judged these images, and it errs too. Look at the pictures.",
    "Numbers made with another protocol (model, prompts, seeds, sampler, judge) cannot be compared with these.",
)
TONES = ("gone", "kept")
IMAGE_SIDE = 128  # pixels of the longer side of an embedded image


@dataclass(frozen=True)
class Headline:
    """A number that a reader sees first.

    Attributes:
        label (`str`): What was measured.
        before (`Estimate` or `None`): Before the change; `None` for a number that compares both models.
        after (`Estimate`): After the change.
        tone (`str`): Its colour: `"gone"` for what should fall, `"kept"` for what should stay.
        note (`str`, defaults to `""`): One more sentence.
    """

    label: str
    before: Estimate | None
    after: Estimate
    tone: str
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """A table of rates before and after, with bars from 0 to 100 % and intervals.

    Attributes:
        title (`str`): Its heading.
        rows (`list[tuple[str, Estimate, Estimate]]`): Label, before, after.
        tone (`str`): `"gone"` or `"kept"`.
        note (`str`, defaults to `""`): What to know before reading it.
    """

    title: str
    rows: list[tuple[str, Estimate, Estimate]]
    tone: str
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """The same seed before and after.

    Attributes:
        caption (`str`): Usually the prompt.
        before (`np.ndarray`): `(H, W, 3)`, `uint8`.
        after (`np.ndarray`): `(H, W, 3)`, `uint8`.
        before_note (`str`, defaults to `"before"`): Stands below the image, such as what a classifier saw.
        after_note (`str`, defaults to `"after"`): The same for the image after.
        missed (`bool`, defaults to `False`): Marks a pair whose image after is not as it should be.
    """

    caption: str
    before: np.ndarray
    after: np.ndarray
    before_note: str = "before"
    after_note: str = "after"
    missed: bool = False


@dataclass(frozen=True)
class Grid:
    """Image pairs under one heading; attributes as in [`Comparison`]."""

    title: str
    pairs: list[Pair]
    tone: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """A whole page, shown in the order of the attributes.

    Attributes:
        title (`str`): Of the page.
        summary (`str`): One or two sentences below it.
        headline (`list[Headline]`): The numbers that matter.
        sections (`list[Comparison | Grid]`): Tables and image pairs, in any order.
        protocol (`dict[str, object]`): Name -> value of everything needed to repeat it: settings, seeds, fingerprints.
        limits (`tuple[str, ...]`, *optional*): What the numbers do not say.
    """

    title: str
    summary: str
    headline: list[Headline]
    sections: list[Comparison | Grid]
    protocol: dict[str, object]
    limits: tuple[str, ...] = LIMITS

    def __post_init__(self):
        for part in [*self.headline, *self.sections]:
            if part.tone not in TONES:
                raise ValueError(f'tone is "{part.tone}"; allowed are {", ".join(TONES)}')


def write_report(folder: str | Path, results: dict, report: Report) -> Path:
    """Writes `results.json` and `report.html`, each whole or not at all.

    Args:
        folder (`str` or `Path`): Where to.
        results (`dict`): Everything measured, of what JSON knows, NumPy numbers and [`Estimate`]s. The report's
            headline is written beside it, under `"headline"`, for [`headline_table`].
        report (`Report`): The page.

    Returns:
        `Path`: Of the page.
    """
    page = render_page(report)
    write_results(folder, {**results, "headline": report.headline})
    path = Path(folder) / "report.html"
    write_text(path, page)
    return path


def write_results(folder: str | Path, results: dict) -> Path:
    """Writes `results.json`; arguments as in [`write_report`].

    Raises:
        `ValueError`: If a number is not finite.
        `TypeError`: If a value does not fit into JSON.
    """
    path = Path(folder) / "results.json"
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False, default=_to_json) + "\n")
    return path


def headline_table(results: dict) -> str:
    """The headline of a `results.json`, read back, as a Markdown table with 95 % intervals.

    Raises:
        `ValueError`: If it has none.
    """

    def told(estimate: dict | None) -> str:
        return str(Estimate(**estimate)) if estimate else ""

    try:
        rows = [[row["label"], told(row["before"]), told(row["after"]), row["note"]] for row in results["headline"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the results have no headline as evaluations write it ({error!r})") from None
    lines = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "\n".join(["| | before | after | |", "|---|---|---|---|", *(f"| {line} |" for line in lines)])


def render_page(report: Report) -> str:
    """The page as HTML, without writing it."""
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    sections = [_comparison(part) if isinstance(part, Comparison) else _grid(part) for part in report.sections]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(report.title)}</h1>
<p class="lead">{escape(report.summary)}</p>
<div class="cards">{"".join(map(_card, report.headline))}</div>
{"".join(sections)}
{_protocol(report.protocol)}
{_limits(report.limits)}
</main>
</body>
</html>
"""


def _card(headline: Headline) -> str:
    was = f"{headline.before.headline} →" if headline.before else ""
    return f"""
<div class="card {headline.tone}">
<div class="label">{escape(headline.label)}</div>
<div class="was number">{escape(was)}</div>
<div class="is number">{escape(headline.after.headline)}</div>
<small class="number">95 %: {escape(headline.after.interval)}, N={headline.after.n}</small>
<small>{escape(headline.note)}</small>
</div>"""


def _comparison(comparison: Comparison) -> str:
    rows = "".join(
        f"""<tr>
<th scope="row">{escape(label)}</th>
<td class="bars">{_bar(before, "before")}{_bar(after, "after")}</td>
{_cell("before", before)}
{_cell("after", after)}
</tr>
"""
        for label, before, after in comparison.rows
    )
    return f"""
<section class="{comparison.tone}">
{_heading(comparison)}
<p class="legend"><span><i class="before"></i>before</span><span><i></i>after</span><span><i class="interval"></i>95 %
interval</span></p>
<table class="comparison">
<thead><tr><th></th><th></th><th>before</th><th>after</th></tr></thead>
<tbody>
{rows}</tbody>
</table>
</section>"""


def _bar(estimate: Estimate, side: str) -> str:
    width = 100 * estimate.value
    low, reach = 100 * estimate.low, 100 * (estimate.high - estimate.low)
    return (
        f'<div class="bar {side}"><b style="width:{width:.1f}%"></b>'
        f'<u style="left:{low:.1f}%;width:{reach:.1f}%"></u></div>'
    )


def _cell(side: str, estimate: Estimate) -> str:
    details = escape(f"{estimate.interval}, N={estimate.n}")
    return (
        f'<td class="number" data-name="{side}">{escape(estimate.headline)} <span class="soft">{details}</span></td>'
    )


def _grid(grid: Grid) -> str:
    return f"""
<section class="{grid.tone}">
{_heading(grid)}
<div class="grid">{"".join(map(_figure, grid.pairs))}</div>
</section>"""


def _figure(pair: Pair) -> str:
    after_class = "after missed" if pair.missed else "after"
    return f"""
<figure>
<figcaption>{escape(pair.caption)}</figcaption>
<div class="pair">
<div>{_image(pair.before, f"{pair.caption}, before")}<span>{escape(pair.before_note)}</span></div>
<div>{_image(pair.after, f"{pair.caption}, after")}<span class="{after_class}">{escape(pair.after_note)}</span></div>
</div>
</figure>"""


def _image(pixels: np.ndarray, alt: str) -> str:
    image = Image.fromarray(pixels)
    scale = IMAGE_SIDE / max(image.size)
    # Scaled here, because browsers enlarge small images into blocks or blur.
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    png = io.BytesIO()
    image.save(png, format="PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" alt="{escape(alt)}">'
    )


def _heading(part: Comparison | Grid) -> str:
    note = f'\n<p class="note">{escape(part.note)}</p>' if part.note else ""
    return f"<h2>{escape(part.title)}</h2>{note}"


def _protocol(protocol: dict[str, object]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>\n" for name, value in protocol.items())
    return f'<section>\n<h2>Protocol</h2>\n<dl class="box">\n{rows}</dl>\n</section>'


def _limits(limits: tuple[str, ...]) -> str:
    items = "".join(f"<li>{escape(limit)}</li>\n" for limit in limits)
    return f'<section>\n<h2>What this does not say</h2>\n<div class="box limits"><ul>\n{items}</ul></div>\n</section>'


def _to_json(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} does not fit into JSON")
