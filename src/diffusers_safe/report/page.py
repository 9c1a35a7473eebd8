"""A report as one HTML file that asks nothing of the network: styles inside, images as base64, plots as SVG.

It works without scripts. Images that were flagged are blurred by a checkbox and CSS; the one slider, for two models,
is an `<input type=range>` that sets a CSS variable.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..provenance import write_text
from .elements import (
    PAGE_NAME,
    Change,
    Comparison,
    Curves,
    Grid,
    Headline,
    Plots,
    Report,
    Shot,
    Strip,
    Table,
    write_results,
)
from .plots import STYLE, curves_svg, scatter_svg, series_class
from .statistics import Estimate


MOST_CARDS = 6  # headline numbers of two models as large cards; more are a table alone
_MOST_COLUMNS = 4  # models that are columns of a table; more are rows
# tone, whether a direction is better, heading
_GROUPS = (
    ("gone", True, "What was to go"),
    ("kept", True, "What was to stay"),
    ("gone", False, "What was to go: neither direction is better in itself"),
    ("kept", False, "Neither direction is better in itself"),
)
_PNG_SIDE = 128  # pixels of the longer side up to which an image is embedded as PNG


def write_report(folder: str | Path, results: dict, report: Report) -> Path:
    """Writes `results.json` and `report.html`, each whole or not at all.

    Args:
        folder (`str` or `Path`): Where to.
        results (`dict`): Everything measured, of what JSON knows, NumPy numbers and [`Estimate`]s. The report's
            headline and warnings are written with it, for [`headline_table`].
        report (`Report`): The page.

    Returns:
        `Path`: Of the page.
    """
    page = render_page(report)
    headline = {"models": list(report.models), "rows": report.headline}
    write_results(folder, {**results, "headline": headline, "warnings": report.warnings})
    path = Path(folder) / PAGE_NAME
    write_text(path, page)
    return path


def render_page(report: Report) -> str:
    """The page as HTML, without writing it."""
    style = STYLE + Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    body = [_SECTIONS[type(part)](part, list(report.models)) for part in report.sections]
    few = len(report.models) <= 2 and len(report.headline) <= MOST_CARDS
    if few and report.headline:
        body = [f'<div class="cards">{"".join(map(_card, report.headline))}</div>', *body]
    if report.headline and (not few or any(headline.changes for headline in report.headline)):
        body.insert(len(body) if few else 0, _results(report))
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
{_warnings(report.warnings)}{"".join(body)}
{_protocol(report.protocol)}
{_limits(report.limits)}
</main>
</body>
</html>
"""


# --- numbers ---------------------------------------------------------------------------------------------------------


def _card(headline: Headline) -> str:
    after = headline.estimates[-1]
    before = headline.estimates[0] if len(headline.estimates) > 1 else None
    was = f"{before.headline} →" if before else ""
    told = f"95 %: {after.interval}, N={after.n}" if after else ""
    change = next(filter(None, headline.changes[-1:]), None)
    changed = f"Change: {change}" if change else ""
    return f"""
<div class="card {headline.tone}">
<div class="label">{escape(headline.label)}</div>
<div class="was number">{escape(was)}</div>
<div class="is number">{escape(after.headline if after else "–")}</div>
<small class="number">{escape(told)}</small>
<small class="number">{escape(changed)}</small>
<small>{escape(headline.note)}</small>
</div>"""


def _results(report: Report) -> str:
    """The table of quantities and models: a column a model, or of many a row a model."""
    groups = [
        (tone, title, [item for item in report.headline if item.tone == tone and (item.better is not None) == valued])
        for tone, valued, title in _GROUPS
    ]
    groups = [group for group in groups if group[2]]
    table = _by_model if len(report.models) > _MOST_COLUMNS else _by_quantity
    note = "In brackets 95 % intervals; N is how many were measured. ● marks the best of all models."
    note += (
        f" Below it the difference to {report.models[0]} on the same prompts and seeds; grey where chance"
        " may have made it: the interval holds 0, or p is 0.05 or more."
        if any(headline.changes for headline in report.headline)
        else ""
    )
    return f"""
<section>
<h2>All numbers</h2>
<p class="note">{escape(note)}</p>
<div class="scroll" tabindex="0" role="region" aria-label="All numbers">
<table class="results">
{table(report.models, groups)}
</table>
</div>
</section>"""


def _by_quantity(models: Sequence[str], groups: list[tuple[str, str, list[Headline]]]) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in models)
    bodies = [
        f'<tbody class="{tone}">\n<tr class="group"><th scope="colgroup" colspan="{len(models) + 1}">'
        f"<span>{title}</span></th></tr>\n"
        + "".join(f'<tr><th scope="row">{_named(item)}</th>{"".join(_results_cells(item))}</tr>\n' for item in items)
        + "</tbody>"
        for tone, title, items in groups
    ]
    return f"<thead><tr><td></td>{heads}</tr></thead>\n{''.join(bodies)}"


def _by_model(models: Sequence[str], groups: list[tuple[str, str, list[Headline]]]) -> str:
    titles = "".join(
        f'<th scope="colgroup" class="{tone}" colspan="{len(items)}"><span>{title}</span></th>'
        for tone, title, items in groups
    )
    items = [item for _, _, of_group in groups for item in of_group]
    heads = "".join(f'<th scope="col">{_named(item)}</th>' for item in items)
    lines = zip(models, *map(_results_cells, items))
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>\n' for name, *cells in lines)
    return f'<thead><tr class="group"><td></td>{titles}</tr>\n<tr><td></td>{heads}</tr></thead>\n<tbody>{rows}</tbody>'


def _named(headline: Headline) -> str:
    """What a quantity is, and which way is better."""
    direction = {"lower": " ↓", "higher": " ↑", None: ""}[headline.better]
    told = {"lower": "lower is better", "higher": "higher is better", None: ""}[headline.better]
    arrow = f'<span class="soft" title="{told}">{direction}</span>' if direction else ""
    note = f"<small>{escape(headline.note)}</small>" if headline.note else ""
    return f"{escape(headline.label)}{arrow}{note}"


def _results_cells(headline: Headline) -> list[str]:
    changes = headline.changes or [None] * len(headline.estimates)
    return [
        _results_cell(estimate, change, headline, place in headline.best)
        for place, (estimate, change) in enumerate(zip(headline.estimates, changes))
    ]


def _results_cell(estimate: Estimate | None, change: Change | None, headline: Headline, best: bool) -> str:
    if estimate is None:
        return '<td class="soft">–</td>'
    told = f'<b>{escape(estimate.headline)}</b><span class="soft">{escape(estimate.interval)}, N={estimate.n}</span>'
    if change is not None:
        told += f'<span class="change {_verdict(change, headline.better)}">{escape(str(change))}</span>'
    return f'<td class="number {headline.tone}{" best" if best else ""}">{told}</td>'


def _verdict(change: Change, better: str | None) -> str:
    if not change.is_clear or better is None:
        return "soft"
    return "good" if (change.estimate.value < 0) == (better == "lower") else "bad"


def _comparison(comparison: Comparison, models: list[str]) -> str:
    rows = "".join(
        f"""<tr>
<th scope="row">{escape(label)}</th>
<td class="bars">{"".join(_bar(estimate, place, len(models)) for place, estimate in enumerate(estimates))}</td>
{"".join(_cell(name, estimate) for name, estimate in zip(models, estimates))}
</tr>
"""
        for label, estimates in comparison.rows
    )
    keys = "".join(
        f'<span><i class="{_side(place, len(models))}"></i>{escape(name)}</span>' for place, name in enumerate(models)
    )
    heads = "".join(f"<th>{escape(name)}</th>" for name in models)
    table = f"""<table class="comparison">
<thead><tr><th></th><th></th>{heads}</tr></thead>
<tbody>
{rows}</tbody>
</table>"""
    if len(models) > 3:
        table = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(comparison.title)}">{table}</div>'
    return f"""
<section class="{comparison.tone}">
{_heading(comparison.title, comparison.note)}
<p class="legend">{keys}<span><i class="interval"></i>95 % interval</span></p>
{table}
</section>"""


def _side(place: int, models: int) -> str:
    """Before and after have the colours of the page; of more models each has its own."""
    return ("before", "after")[place] if models == 2 else series_class(place)


def _bar(estimate: Estimate | None, place: int, models: int) -> str:
    side = _side(place, models)
    if estimate is None:
        return f'<div class="bar {side}"></div>'
    width = 100 * estimate.value
    low, reach = 100 * estimate.low, 100 * (estimate.high - estimate.low)
    return (
        f'<div class="bar {side}"><b style="width:{width:.1f}%"></b>'
        f'<u style="left:{low:.1f}%;width:{reach:.1f}%"></u></div>'
    )


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return f'<td class="number soft" data-name="{escape(name)}">–</td>'
    details = escape(f"{estimate.interval}, N={estimate.n}")
    told = f'{escape(estimate.headline)} <span class="soft">{details}</span>'
    return f'<td class="number" data-name="{escape(name)}">{told}</td>'


def _table(table: Table, models: list[str]) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    bodies = []
    for title, rows in table.groups:
        head = f'<tr class="group"><th colspan="{len(table.columns)}"><span>{escape(title)}</span></th></tr>\n'
        lines = "".join(
            f'<tr{_own_class((title, place) in table.own)}><th scope="row">{escape(row[0])}</th>'
            f"{''.join(_cells(rows, place, table.merged))}</tr>\n"
            for place, row in enumerate(rows)
        )
        bodies.append(f"<tbody>\n{head if title else ''}{lines}</tbody>")
    return f"""
<section>
{_heading(table.title, table.note)}
<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">
<table class="results text{" merged" if table.merged else ""}">
<thead><tr>{heads}</tr></thead>
{"".join(bodies)}
</table>
</div>
</section>"""


def _cells(rows: list[Sequence[str]], place: int, merged: bool) -> Iterator[str]:
    """The cells of a row behind its head."""
    for column, cell in enumerate(rows[place][1:], start=1):
        may_merge = merged and column > 1 and cell
        if may_merge and place > 0 and rows[place - 1][column] == cell:
            continue  # the row above says it for this one
        span = 1
        while may_merge and place + span < len(rows) and rows[place + span][column] == cell:
            span += 1
        told = f' rowspan="{span}"' if span > 1 else ""
        yield f"<td{told}>{_text_or_link(cell)}</td>"


def _own_class(own: bool) -> str:
    return ' class="own"' if own else ""


def _text_or_link(cell: str) -> str:
    """Text, whose last word becomes a link if it is an address."""
    text, _, last = cell.rpartition(" ")
    if not last.startswith("https://"):
        return escape(cell)
    return f'{escape(text)} <a href="{escape(last)}">{escape(last.removeprefix("https://"))}</a>'.strip()


# --- plots -----------------------------------------------------------------------------------------------------------


def _plots(part: Plots, models: list[str]) -> str:
    drawn = "".join(
        f'<figure class="plot">{curves_svg(plot) if isinstance(plot, Curves) else scatter_svg(plot, models)}</figure>'
        for plot in part.plots
    )
    lines = any(isinstance(plot, Curves) for plot in part.plots)
    keys = "".join(f'<span><i class="{series_class(i)}"></i>{escape(name)}</span>' for i, name in enumerate(models))
    legend = f'<p class="legend">{keys}<span>band: 95 % interval</span></p>' if lines else ""
    return f'\n<section>\n{_heading(part.title, part.note)}\n{legend}<div class="plots">{drawn}</div>\n</section>'


# --- pictures --------------------------------------------------------------------------------------------------------


def _grid(grid: Grid, models: list[str]) -> str:
    blurred = any(shot.blurred for strip in grid.strips for shot in strip.shots)
    large = grid.side > _PNG_SIDE
    tools = []
    if large and len(models) == 2:
        tools.append('<label><input type="checkbox" class="overlay"> lay them over each other, with a slider</label>')
    if blurred:
        tools.append('<label><input type="checkbox" class="reveal-all"> show all blurred images</label>')
    bar = f'<p class="tools">{"".join(tools)}</p>' if tools else ""
    size = "large" if large else "small"
    figures = "".join(_figure(strip, models, grid.side) for strip in grid.strips)
    return f"""
<section class="{grid.tone}">
{_heading(grid.title, grid.note)}
{bar}
<div class="grid {size} of-{min(len(models), 6)}">{figures}</div>
</section>"""


def _figure(strip: Strip, models: list[str], side: int) -> str:
    named = side > _PNG_SIDE or len(models) > 2  # before and after are told apart by their colours
    pairs = enumerate(zip(models, strip.shots))
    shots = "".join(_shot(strip.caption, *pair, place, side, named) for place, pair in pairs)
    slider = ""
    if side > _PNG_SIDE and len(models) == 2:
        moved = "this.closest('figure').style.setProperty('--cut', this.value + '%')"
        name = escape(f"{strip.caption}: where {models[0]} ends and {models[1]} begins")
        slider = (
            f'<input type="range" class="slider" min="0" max="100" value="50" aria-label="{name}" oninput="{moved}">'
        )
    return f"""
<figure>
<figcaption>{escape(strip.caption)}</figcaption>
<div class="shots">{shots}</div>{slider}
</figure>"""


def _shot(caption: str, model: str, shot: Shot, place: int, side: int, named: bool) -> str:
    image = _image(shot.image, f"{caption}, {model}", side)
    if shot.blurred:
        state = "flagged" if shot.flagged else "blurred"
        name = escape(f"show the {state} image: {caption}, {model}")
        image = (
            f'<label class="blur"><input type="checkbox" class="reveal" aria-label="{name}">{image}'
            f'<span class="hint">{state} · show</span></label>'
        )
    state = " ".join(["after" if place else "before", *(["missed"] if shot.missed else [])])
    name = escape(f"{model}: {shot.note}" if shot.note and named else shot.note or model)
    return f'\n<div class="shot">{image}<span class="told {state}">{name}</span></div>'


def _image(pixels: np.ndarray, alt: str, side: int) -> str:
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    if scale < 1 or side <= _PNG_SIDE:
        # Scaled here, because browsers enlarge small images into blocks or blur.
        image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= _PNG_SIDE else "jpeg"
    file = io.BytesIO()
    # An optimised PNG takes five times as long, for 2 % of its size.
    image.save(file, format=kind, **({"quality": 85, "optimize": True} if kind == "jpeg" else {}))
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img src="data:image/{kind};base64,{data}" width="{image.width}" height="{image.height}"'
        f' alt="{escape(alt)}">'
    )


# --- the rest --------------------------------------------------------------------------------------------------------


def _heading(title: str, note: str) -> str:
    told = f'\n<p class="note">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{told}"


def _warnings(warnings: tuple[str, ...]) -> str:
    items = "".join(f"<li>{escape(text)}</li>\n" for text in warnings)
    return f'<div class="box limits warnings" role="note"><ul>\n{items}</ul></div>' if items else ""


def _protocol(protocol: dict[str, object]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>\n" for name, value in protocol.items())
    return f'<section>\n<h2>Protocol</h2>\n<dl class="box">\n{rows}</dl>\n</section>'


def _limits(limits: tuple[str, ...]) -> str:
    items = "".join(f"<li>{escape(limit)}</li>\n" for limit in limits)
    return f'<section>\n<h2>What this does not say</h2>\n<div class="box limits"><ul>\n{items}</ul></div>\n</section>'


_SECTIONS = {Comparison: _comparison, Grid: _grid, Table: _table, Plots: _plots}
