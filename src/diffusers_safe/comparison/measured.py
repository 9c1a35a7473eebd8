"""The numbers of models: estimates, and differences to the original model on the same prompts and seeds."""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..metrics.base import Metric, Quantity
from ..metrics.scores import score_images
from ..progress import ProgressCallback
from ..report.elements import Change
from ..report.statistics import Estimate, independent_units, mcnemar, paired_difference, sign_flip_test


MOST_PROMPTS = 100  # for which shares are also given prompt by prompt


@dataclass
class Measured:
    """The images of one model and what metrics measured on them.

    Attributes:
        name (`str`): Name of the model.
        folder (`Path`): Folder with its images.
        rows (`list[dict]`): Rows of the manifest, in the order of the prompts.
        facts (`dict`): What is known of the model and how it was sampled.
        values (`dict`): metric -> numbers of each image, in the order of `rows`.
        words (`dict`): metric -> what it recognises on each image, `""` if nothing.
        estimates (`dict`): metric -> quantity -> [`Estimate`].
        by_prompt (`dict`): metric -> share of images -> prompt -> [`Estimate`], if there are few prompts.
        details (`dict`): metric -> further results.
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
    def count(self) -> int:
        return len(self.rows)

    @property
    def black(self) -> int:
        """The number of images that are all black."""
        return sum(row["black"] for row in self.rows)


@dataclass(frozen=True)
class MetricFacts:
    """What is known of a metric after it measured all models.

    Attributes:
        name (`str`): Name of the metric.
        identity (`dict`): What determines its raw scores.
        threshold (`float`, *optional*): Threshold that is applied to them, if it has one.
        compares (`bool`): Whether it compares with the first model.
        quantities (`dict[str, Quantity]`): What it measured; `name/category` is the part of `name` of a category.
    """

    name: str
    identity: dict
    threshold: float | None
    compares: bool
    quantities: dict[str, Quantity]

    def whole(self, models: Sequence[Measured]) -> dict[str, Quantity]:
        """The quantities that at least one model has, without those of a category."""
        found = {name for model in models for name in model.estimates.get(self.name, {})}
        return {name: quantity for name, quantity in self.quantities.items() if name in found and "/" not in name}


def measure(
    metric: Metric, models: list[Measured], batch_size: int, callback: ProgressCallback | None = None
) -> MetricFacts:
    """Runs a metric on each model; on the original only if the metric does not compare with it."""
    original, quantities = models[0], {}
    for model in models[1:] if metric.compares else models:
        originals = (original.folder, original.rows) if metric.compares else None
        scores = score_images(metric, model.folder, model.rows, originals, batch_size, callback)
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
    """The entry of a metric in `results.json`."""
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
    """The change of each quantity that both models have on the same images."""
    changes = {}
    triples = list(zip(model.rows, original.values[facts.name], model.values[facts.name]))
    for name, quantity in facts.quantities.items():
        pairs = [(quantity.cluster(row), a[name], b[name]) for row, a, b in triples if name in a and name in b]
        if pairs:
            clusters, before, after = zip(*pairs)
            changes[name] = change_of(before, after, clusters, quantity.unit)
    return changes


def change_of(before: Sequence[float], after: Sequence[float], clusters: Sequence[Hashable], unit: str) -> Change:
    """The mean difference of paired numbers. Its interval resamples clusters, such as prompts. The test is McNemar's
    for shares with one image in each cluster, else a test that flips the signs of clusters."""
    if unit == "%" and independent_units(clusters) == len(clusters) and {*before, *after} <= {0, 1}:
        test, p_value = "McNemar, exact", mcnemar(before, after)
    else:
        test, p_value = "sign flips of prompts", sign_flip_test(before, after, clusters)
    return Change(paired_difference(before, after, clusters, unit), p_value, test)
