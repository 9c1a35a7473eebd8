"""Renders a report as one self-contained HTML file: inline styles, images as base64, plots as SVG, nothing external.

The page works without scripts. Flagged images are blurred with a checkbox and CSS; the slider that overlays the images
of two models is an `<input type=range>` that sets a CSS variable. The templates escape everything they insert.
"""

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .elements import LARGE_SIDE, SMALL_SIDE, Curves, Headline, Report, Scatter
from .plots import STYLE, curves_svg, scatter_svg, series_class


MOST_CARDS = 6  # headline numbers of two models that are shown as large cards; more are shown only in the table
_MOST_COLUMNS = 4  # models that are columns of the table of numbers; with more, each model is a row
_TEMPLATES = Path(__file__).with_name("templates")
# (tone, whether a direction is better, heading)
_GROUPS = (
    ("gone", True, "Erased concept"),
    ("kept", True, "Other concepts"),
    ("gone", False, "Erased concept: neither direction is better in itself"),
    ("kept", False, "Neither direction is better in itself"),
)


def render_page(report: Report) -> str:
    """Renders a report as HTML."""
    few = len(report.models) <= 2 and len(report.headline) <= MOST_CARDS
    has_table = not few or any(headline.changes for headline in report.headline)
    style = STYLE + (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return _environment.get_template("page.html").render(
        report=report,
        style=Markup(style),
        few=few,
        cards=few and report.headline,
        groups=_groups(report.headline) if has_table else [],
        sections=[(type(part).__name__, part) for part in report.sections],
    )


def render_table(table: list[tuple[str, ...]], notes: list[str]) -> str:
    """Renders rows of cells, the first of them the head, and notes as HTML."""
    return _environment.get_template("table.html").render(table=table, notes=notes)


def _groups(headlines: list[Headline]) -> list[dict]:
    groups = [
        {
            "tone": tone,
            "title": title,
            "items": [item for item in headlines if item.tone == tone and (item.better is not None) == directed],
        }
        for tone, directed, title in _GROUPS
    ]
    return [group for group in groups if group["items"]]


def _model_class(place: int, models: list[str]) -> str:
    """The CSS class of a model: before and after have the page's colours, more models a colour each."""
    return ("before", "after")[place] if len(models) == 2 else series_class(place)


def _svg(plot: Curves | Scatter, models: list[str]) -> Markup:
    return Markup(curves_svg(plot) if isinstance(plot, Curves) else scatter_svg(plot, models))


def _embedded(pixels: np.ndarray, large: bool) -> dict:
    """An image as a data URL, with its size."""
    image = Image.fromarray(pixels)
    scale = (LARGE_SIDE if large else SMALL_SIDE) / max(image.size)
    if scale < 1 or not large:
        # Small images are enlarged here, because browsers would show them with blocks or blurred.
        image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # An optimised PNG takes five times as long to write and is 2 % smaller.
    kind, options = ("jpeg", {"quality": 85, "optimize": True}) if max(image.size) > SMALL_SIDE else ("png", {})
    image.save(file, format=kind, **options)
    data = base64.b64encode(file.getvalue()).decode()
    return {"src": f"data:image/{kind};base64,{data}", "width": image.width, "height": image.height}


_environment = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.globals["most_columns"] = _MOST_COLUMNS
_environment.filters |= {
    "embedded": _embedded,
    "model_class": _model_class,
    "percent": lambda share: f"{100 * share:.1f}%",
    "series_class": series_class,
    "svg": _svg,
}
