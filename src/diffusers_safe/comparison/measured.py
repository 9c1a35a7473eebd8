"""What metrics say of models: numbers, differences to the original on the same prompts and seeds."""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..metrics.base import Metric, Quantity
from ..metrics.scores import score_images
from ..report.elements import Change
from ..report.statistics import Estimate, independent_units, mcnemar, paired_difference, sign_flip_test


MOST_PROMPTS = 100  # whose shares are also told one by one


@dataclass
class Measured:
    """One model's images and what metrics say of them.

    Attributes:
        name (`str`): Of the model.
        folder (`Path`): With its images.
        rows (`list[dict]`): Of the manifest, in the order of the prompts.
        facts (`dict`): What is known of the model and how it was sampled.
        values (`dict`): metric -> numbers of each image, in the order of `rows`.
        words (`dict`): metric -> what it sees on each image, `""` where it does not say.
        estimates (`dict`): metric -> quantity -> [`Estimate`].
        by_prompt (`dict`): metric -> share of images -> prompt -> [`Estimate`], where there are few prompts.
        details (`dict`): metric -> what else it says.
        sweeps (`dict`): metric -> label -> (threshold, [`Estimate`]) in order.
    """

    name: str
    folder: Path
    rows: list[dict]
    facts: dict
    values: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    words: dict[str, list[str]] = field(default_factory=dict)
    estimates: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    by_prompt: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    details: dict[str, dict] = field(default_factory=dict)
    sweeps: dict[str, dict[str, list[tuple[float, Estimate]]]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash of all images."""
        return hashlib.sha256("".join(row["sha256"] for row in self.rows).encode()).hexdigest()

    @property
    def black(self) -> int:
        return sum(row["black"] for row in self.rows)


@dataclass(frozen=True)
class MetricFacts:
    """What is known of a metric when it has measured all models.

    Attributes:
        name (`str`): Of the metric.
        identity (`dict`): What decides its raw scores.
        threshold (`float`, *optional*): What is applied to them, where it has such a thing.
        compares (`bool`): Whether it compares with the first model.
        quantities (`dict[str, Quantity]`): What it gave; `name/category` is the part of `name` that is of a category.
    """

    name: str
    identity: dict
    threshold: float | None
    compares: bool
    quantities: dict[str, Quantity]

    def whole(self, models: Sequence[Measured]) -> dict[str, Quantity]:
        """The quantities of all images, without those of a category, that concern at least one model."""
        found = {name for model in models for name in model.estimates.get(self.name, {})}
        return {name: quantity for name, quantity in self.quantities.items() if name in found and "/" not in name}


def measure(metric: Metric, models: list[Measured], batch_size: int) -> MetricFacts:
    """What a metric says of each model; of the original nothing, where it is what others are compared with."""
    original, quantities = models[0], {}
    for model in models[1:] if metric.compares else models:
        originals = (original.folder, original.rows) if metric.compares else None
        scores = score_images(metric, model.folder, model.rows, originals, batch_size)
        metric.reset()
        metric.update(model.rows, scores)
        model.estimates[metric.name] = metric.compute()
        model.details[metric.name] = metric.details()
        model.values[metric.name] = [metric.values(row, score) for row, score in zip(model.rows, scores)]
        model.words[metric.name] = [metric.seen(row, score) for row, score in zip(model.rows, scores)]
        model.by_prompt[metric.name] = _by_prompt(metric.quantities, model.rows, model.values[metric.name])
        if hasattr(metric, "sweep"):
            model.sweeps[metric.name] = metric.sweep()
        quantities |= metric.quantities
    metric.reset()
    threshold = getattr(metric, "threshold", None)
    return MetricFacts(metric.name, metric.identity(), threshold, metric.compares, quantities)


def _by_prompt(
    quantities: dict[str, Quantity], rows: list[dict], values: list[dict[str, float]]
) -> dict[str, dict[str, Estimate]]:
    found = {}
    for name, quantity in quantities.items():
        answers: dict[str, list[float]] = {}
        for row, of_image in zip(rows, values):
            if quantity.unit == "%" and "/" not in name and name in of_image:
                answers.setdefault(row["prompt"], []).append(of_image[name])
        if 1 < len(answers) <= MOST_PROMPTS:
            found[name] = {
                prompt: Estimate.rate(int(sum(of_prompt)), len(of_prompt)) for prompt, of_prompt in answers.items()
            }
    return found


def metric_results(facts: MetricFacts, models: list[Measured]) -> dict:
    """What `results.json` says of a metric."""
    measured = [model for model in models if facts.name in model.estimates]
    return {
        "identity": facts.identity,
        "threshold": facts.threshold,
        "quantities": {name: asdict(quantity) for name, quantity in facts.quantities.items()},
        "estimates": {model.name: model.estimates[facts.name] for model in measured},
        "differences": {}
        if facts.compares
        else {model.name: _changes(facts, models[0], model) for model in models[1:]},
        "by_prompt": {model.name: model.by_prompt[facts.name] for model in measured},
        "details": {model.name: model.details[facts.name] for model in measured},
        "sweeps": {model.name: model.sweeps[facts.name] for model in measured if facts.name in model.sweeps},
    }


def _changes(facts: MetricFacts, original: Measured, model: Measured) -> dict[str, Change]:
    """Of each quantity that both models have on the same images."""
    changes = {}
    triples = list(zip(model.rows, original.values[facts.name], model.values[facts.name]))
    for name, quantity in facts.quantities.items():
        pairs = [
            (quantity.trajectory_prompts(row), a[name], b[name]) for row, a, b in triples if name in a and name in b
        ]
        if pairs:
            clusters, before, after = zip(*pairs)
            changes[name] = change_of(before, after, clusters, quantity.unit)
    return changes


def change_of(before: Sequence[float], after: Sequence[float], clusters: Sequence[Hashable], unit: str) -> Change:
    """The mean difference of paired numbers. The interval draws clusters, such as prompts, anew; the test is McNemar's
    for shares of clusters of one image each, else one that flips the signs of clusters."""
    if unit == "%" and independent_units(clusters) == len(clusters) and {*before, *after} <= {0, 1}:
        test, p_value = "McNemar, exact", mcnemar(before, after)
    else:
        test, p_value = "sign flips of prompts", sign_flip_test(before, after, clusters)
    return Change(paired_difference(before, after, clusters, unit), p_value, test)
