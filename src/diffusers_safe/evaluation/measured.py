"""What metrics say of models: numbers, differences to the original on the same prompts and seeds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .metrics.base import Metric, Quantity
from .report import Change
from .scores import score_images
from .statistics import Estimate


@dataclass
class Measured:
    """One model's images and what metrics say of them.

    Attributes:
        name (`str`): Of the model.
        folder (`Path`): With its images.
        rows (`list[dict]`): Of the manifest, in the order of the prompts.
        facts (`dict`): What is known of the model and how it was sampled.
        values (`dict`): metric -> numbers of each image, in the order of `rows`.
        estimates (`dict`): metric -> quantity -> [`Estimate`].
        details (`dict`): metric -> what else it says.
        sweeps (`dict`): metric -> label -> (threshold, [`Estimate`]) in order.
    """

    name: str
    folder: Path
    rows: list[dict]
    facts: dict
    values: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    estimates: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    details: dict[str, dict] = field(default_factory=dict)
    sweeps: dict[str, dict[str, list[tuple[float, Estimate]]]] = field(default_factory=dict)

    @property
    def black(self) -> int:
        return sum(row["black"] for row in self.rows)


def measure(metric: Metric, models: list[Measured], batch_size: int) -> None:
    """What a metric says of each model; of the original nothing, where it is what others are compared with."""
    original = models[0]
    for model in models[1:] if metric.compares else models:
        originals = (original.folder, original.rows) if metric.compares else None
        scores = score_images(metric, model.folder, model.rows, originals, batch_size)
        metric.reset()
        metric.update(model.rows, scores)
        model.estimates[metric.name] = metric.compute()
        model.details[metric.name] = metric.details()
        model.values[metric.name] = [metric.values(row, score) for row, score in zip(model.rows, scores)]
        if hasattr(metric, "sweep"):
            model.sweeps[metric.name] = metric.sweep()
    metric.reset()


def metric_results(metric: Metric, models: list[Measured]) -> dict:
    measured = [model for model in models if metric.name in model.estimates]
    return {
        "identity": metric.identity(),
        "threshold": getattr(metric, "threshold", None),
        "compares": metric.compares,
        "quantities": {name: asdict(quantity) for name, quantity in metric.quantities.items()},
        "estimates": {model.name: model.estimates[metric.name] for model in measured},
        "differences": {
            model.name: {
                name: change
                for name, quantity in metric.quantities.items()
                if (change := paired_change(models[0], model, metric.name, name, quantity)) is not None
            }
            for model in models[1:]
            if not metric.compares
        },
        "details": {model.name: model.details[metric.name] for model in measured},
        "sweeps": {model.name: model.sweeps[metric.name] for model in measured if metric.name in model.sweeps},
    }


def paired_change(original: Measured, model: Measured, metric: str, name: str, quantity: Quantity) -> Change | None:
    """The difference of two models on the images whose number both have; `None` where there is none."""
    pairs = [
        (row["prompt"], before[name], after[name])
        for row, before, after in zip(model.rows, original.values.get(metric, []), model.values.get(metric, []))
        if name in before and name in after
    ]
    if not pairs:
        return None
    prompts, before, after = zip(*pairs)
    return change_of(before, after, prompts, quantity.unit)


def change_of(before: Sequence[float], after: Sequence[float], prompts: Sequence[str], unit: str) -> Change:
    """The mean difference of paired numbers, with an interval that draws prompts anew."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return Change(Estimate.mean(difference, prompts, "points" if unit == "%" else ""))
