"""Small plots as inline SVG. The page's CSS sets their colours, so they follow its light and dark theme."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .elements import Curves, Scatter
from .statistics import Estimate


SERIES = 11  # colours of plots.css besides the first model's; further models repeat them, dashed
WIDTH, HEIGHT = 460, 330
STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 24, 16, 46
_CHARACTER, _LINE = 7.9, 15  # width of a character and height of a line in a label, in pixels
_LONGEST = 22  # characters of a label


def plot_file(svg: str) -> str:
    """A plot as a standalone SVG file, with its colours."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{WIDTH}" height="{HEIGHT}"'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="var(--card)"/>'
    return svg.replace("<svg", head, 1).replace(">", f"><style>\n{STYLE}</style>{ground}", 1) + "\n"


def series_class(place: int) -> str:
    """The CSS class of a model's colour."""
    return "s0" if place == 0 else f"s{1 + (place - 1) % SERIES}{' again' if place > SERIES else ''}"


def scatter_svg(plot: Scatter, models: Sequence[str]) -> str:
    """Plots points with intervals as crosses, and labels that do not overlap."""
    shown = [(place, point) for place, point in enumerate(plot.points) if point is not None]
    x = _Axis([point[0] for _, point in shown], _LEFT, WIDTH - _RIGHT)
    y = _Axis([point[1] for _, point in shown], HEIGHT - _BOTTOM, _TOP)
    marks, taken = [], []
    for place, (right, up) in shown:
        left, top = x(right.value), y(up.value)
        bars = [(x(right.low), top, x(right.high), top), (left, y(up.low), left, y(up.high))]
        title = escape(f"{models[place]}: {plot.x_label} {right}; {plot.y_label} {up}")
        lines = "".join(f'<line class="cross" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'
                        for a, b, c, d in bars)  # fmt: skip
        marks.append(f'<g class="{series_class(place)}"><title>{title}</title>{lines}'
                     f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5.5"/></g>')  # fmt: skip
        taken += [(left - 7, top - 7, left + 7, top + 7)]
        taken += [(a - 1, min(b, d) - 1, c + 1, max(b, d) + 1) for a, b, c, d in bars]
    labels = []
    for place, (right, up) in shown:
        name = models[place] if len(models[place]) <= _LONGEST else f"{models[place][: _LONGEST - 1]}…"
        labels.append(_label(name, x(right.value), y(up.value), taken, series_class(place)))
    return _svg(f"{plot.y_label} against {plot.x_label}", x, y, plot.x_label, plot.y_label,
                f"{_corner(plot.better)}{''.join(marks)}{''.join(labels)}")  # fmt: skip


def curves_svg(plot: Curves) -> str:
    """Plots a line and a band for each model."""
    points = [point for line in plot.lines for point in line]
    thresholds = [Estimate(value, value, value, 1, "") for value, _ in points]
    x, y = _Axis(thresholds, _LEFT, WIDTH - _RIGHT), _Axis([e for _, e in points], HEIGHT - _BOTTOM, _TOP)
    shapes = ""
    if plot.at is not None and x.low <= plot.at <= x.high:
        shapes = f'<line class="at" x1="{x(plot.at):.1f}" x2="{x(plot.at):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
    for place, line in enumerate(plot.lines):
        if not line:
            continue
        low = [(x(value), y(estimate.low)) for value, estimate in line]
        high = [(x(value), y(estimate.high)) for value, estimate in line]
        middle = [(x(value), y(estimate.value)) for value, estimate in line]
        shapes += (f'<g class="{series_class(place)}"><polygon class="band" points="{_path(low + high[::-1])}"/>'
                  f'<polyline class="line" points="{_path(middle)}"/></g>')  # fmt: skip
    return _svg(f"{plot.y_label} by {plot.x_label}", x, y, plot.x_label, plot.y_label, shapes)


class _Axis:
    """Maps numbers to pixels, with round ticks around all intervals. `"%"` is shown times 100."""

    def __init__(self, estimates: Sequence[Estimate], start: float, end: float):
        lows, highs = [e.low for e in estimates], [e.high for e in estimates]
        values = [e.value for e in estimates]
        low, high = min([*lows, *values], default=0.0), max([*highs, *values], default=1.0)
        reach = (high - low) or abs(high) or 1.0
        self.percent = bool(estimates) and estimates[0].unit in ("%", "points")
        self.step = _round_step(reach / 4)
        if all(value == round(value) for value in values) and not self.percent:
            self.step = max(1.0, round(self.step))
        self.low = math.floor((low - 0.02 * reach) / self.step) * self.step
        self.high = math.ceil((high + 0.02 * reach) / self.step) * self.step
        if low >= 0:
            self.low = max(0.0, self.low)
        if self.percent and estimates[0].unit == "%":
            self.high = min(1.0, self.high)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        count = round((self.high - self.low) / self.step)
        values = [self.low + i * self.step for i in range(count + 1)]
        return [(value, self._text(value)) for value in values if value <= self.high + 1e-9]

    def _text(self, value: float) -> str:
        scale = 100 if self.percent else 1
        decimals = max(0, -math.floor(math.log10(self.step * scale) + 1e-9))
        return f"{value * scale + 0.0:.{decimals}f}{' %' if self.percent else ''}"


def _round_step(rough: float) -> float:
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _label(text: str, x: float, y: float, taken: list[tuple], colour: str) -> str:
    """A label near its point, at the first free position, else at the one that overlaps least."""
    width = _CHARACTER * len(text)
    best = None
    for reach in (10, 24, 40, 60, 84):
        for right, up in ((1, 0), (-1, 0), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7), (0, -1), (0, 1)):
            middle_x = x + right * reach + math.copysign(width / 2, right) if right else x
            middle_y = y + up * (reach + _LINE / 3)
            box = (middle_x - width / 2, middle_y - _LINE / 2, middle_x + width / 2, middle_y + _LINE / 2)
            outside = box[0] < _LEFT + 2 or box[2] > WIDTH - 2 or box[1] < 2 or box[3] > HEIGHT - _BOTTOM - 2
            covered = sum(_overlap(box, other) for other in taken) + 1e4 * outside
            if best is None or covered < best[0]:
                best = (covered, box, reach)
        if best[0] == 0:
            break
    _, box, reach = best
    taken.append(box)
    middle_x, middle_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    leader = ""
    if reach > 24:
        near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        leader = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"/>'
    return (f'<g class="{colour}">{leader}<text class="name" x="{middle_x:.1f}" y="{middle_y + 4:.1f}"'
            f' text-anchor="middle">{escape(text)}</text></g>')  # fmt: skip


def _overlap(a: tuple, b: tuple) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _corner(better: tuple[str, str]) -> str:
    """An arrow in the better direction, below the axis at the better end, where there are no points."""
    arrow = {("lower", "lower"): "↙", ("higher", "lower"): "↘", ("lower", "higher"): "↖", ("higher", "higher"): "↗"}
    x, anchor = (_LEFT, "start") if better[0] == "lower" else (WIDTH - _RIGHT, "end")
    text = f"{arrow[better]} better" if better[0] == "lower" else f"better {arrow[better]}"
    return f'<text class="corner" x="{x}" y="{HEIGHT - 10}" text-anchor="{anchor}">{text}</text>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(title: str, x: _Axis, y: _Axis, x_label: str, y_label: str, shapes: str) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    lines = "".join(f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
                    f'<text class="tick" x="{_LEFT - 7}" y="{y(v) + 4:.1f}" text-anchor="end">{text}</text>'
                    for v, text in y.ticks)  # fmt: skip
    lines += "".join(f'<line class="rule" y1="{_TOP}" y2="{bottom}" x1="{x(v):.1f}" x2="{x(v):.1f}"/>'
                     f'<text class="tick" x="{x(v):.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>'
                     for v, text in x.ticks)  # fmt: skip
    middle = (_LEFT + right) / 2
    names = (f'<text class="axis" x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>'
             f'<text class="axis" transform="translate(13 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
             f"{escape(y_label)}</text>")  # fmt: skip
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{lines}{names}{shapes}</svg>'
