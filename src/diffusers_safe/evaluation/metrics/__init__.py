"""Passes over finished images, one file each, and the table of them by name.

    metrics = make_metrics(["nudity", "lpips"], MetricOptions(lpips_trunk="alexnet.pth", lpips_linear="alex.pth"))

Nothing heavy is imported before a metric is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .base import Metric


@dataclass
class MetricOptions:
    """What metrics are made of, each option by the name of its metric. What a chosen metric lacks, it names."""


@dataclass(frozen=True)
class MetricKind:
    """A line of the table.

    Attributes:
        description (`str`): What it measures, in a few words.
        make (`Callable[[MetricOptions], Metric]`): Loads what it needs and makes it; raises a `ValueError` that says
            what is missing.
    """

    description: str
    make: Callable[[MetricOptions], Metric]


def _pixel_distance(options: MetricOptions) -> Metric:
    from .pixel_distance import PixelDistance

    return PixelDistance()


METRICS: dict[str, MetricKind] = {
    "pixel_distance": MetricKind("how far pixels moved from the original model's image", _pixel_distance),
}


def make_metrics(names: Sequence[str], options: MetricOptions | None = None) -> list[Metric]:
    """Makes metrics by their names, with all that they need loaded.

    Args:
        names (`Sequence[str]`): Names of `METRICS`, at least one, each once.
        options (`MetricOptions`, *optional*): What to make them of.

    Returns:
        `list[Metric]`: In the order of `names`.

    Raises:
        `ValueError`: If a name is unknown or occurs twice, or a metric lacks a library or weights: all that is wrong
            in one line, with what to get and where to put it.
    """
    if not names:
        raise ValueError(f"metrics: none given; known are {', '.join(METRICS)}")
    for place, name in enumerate(names):
        if name not in METRICS:
            raise ValueError(f"metric '{name}': unknown; known are {', '.join(METRICS)}")
        if name in names[:place]:
            raise ValueError(f"metric '{name}': given twice")
    options = options or MetricOptions()
    made, problems = [], []
    for name in names:
        try:
            made.append(METRICS[name].make(options))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return made
