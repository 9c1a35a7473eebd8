"""The report on an evaluation: which numbers, plots and images of which models, and the text around them."""

from collections.abc import Iterator, Sequence

from ..metrics.base import Quantity
from ..report.builder import (
    in_words,
    model_in_words,
    protocol_in_words,
    seeds_in_words,
    short_identity,
    warnings_of_images,
    warnings_of_size,
)
from ..report.elements import TONES, Comparison, Curves, Headline, Plots, Report, Scatter, Table
from ..report.statistics import Estimate
from .measured import Measured, MetricFacts
from .paper_results import published_numbers
from .shown_images import image_grids, recognised_table


_MOST_PLOTS = 4


def evaluation_report(
    results: dict, models: list[Measured], metrics: Sequence[MetricFacts], title: str, blur: str, pictures: int
) -> Report:
    names = [model.name for model in models]
    measures = [
        *_trade_off(models, metrics),
        *_sweeps(models, metrics),
        *_against_papers(results, models, metrics),
        *_by_category(models, metrics),
    ]
    grids, by_prompt, looks = image_grids(models, metrics, blur, pictures), list(_by_prompt(models, metrics)), []
    for tone in TONES:
        looks += [part for part in [*grids, *by_prompt] if part.tone == tone]
        looks += recognised_table(models, metrics) if tone == "gone" else []
    prompts = results["protocol"]["prompts"]
    return Report(
        title=title
        or (f"{names[-1]} compared with {names[0]}" if len(names) == 2 else f"{len(names)} models compared"),
        summary=f"{', '.join(names)}: the same {prompts['images']} images of {prompts['different']} prompts"
        f"{_repeated(prompts)}, generated with the same seeds.",
        models=names,
        headline=[_headline(metric, name, models, results) for metric in metrics for name in metric.whole(models)],
        sections=looks + measures if len(models) <= 2 else measures + looks,
        protocol=_protocol(results),
        warnings=tuple(warnings_of(models, metrics)),
    )


def _protocol(results: dict) -> dict[str, str]:
    prompts = results["protocol"]["prompts"]
    source = prompts.get("source", "given in Python")
    count = f"{prompts['different']} prompts, {prompts['images']} images of each model"
    metrics = {f"metric {name}": in_words(_identity(metric)) for name, metric in results["metrics"].items()}
    return protocol_in_words(results, f"{source}: {count}, {seeds_in_words(prompts)}", metrics)


def _identity(metric: dict) -> dict:
    """What determines the numbers of a metric, from its entry in `results.json`."""
    return {**short_identity(metric["identity"]), "threshold": metric["threshold"]}


def describe_evaluation(results: dict) -> tuple[str, list[str]]:
    """The text of `results.md`: how to read its table, and how the numbers were made."""
    protocol = results["protocol"]
    prompts, original = protocol["prompts"], protocol["original"]
    note = f"95 % intervals in brackets, differences to {original} on the same prompts and seeds in parentheses."
    return note, [
        f"* {prompts['images']} images of each model for {prompts['different']} prompts{_repeated(prompts)}"
        f" ({prompts.get('source', 'given in Python')}; sha256 of ids, prompts and seeds {prompts['sha256'][:16]})",
        *(f"* {name}: {model_in_words(facts)}" for name, facts in results["models"].items()),
        *(f"* {name}: {in_words(_identity(metric))}" for name, metric in results["metrics"].items()),
        f"* {in_words(protocol['versions'])}; {protocol['created']}",
    ]


def _repeated(prompts: dict) -> str:
    count = prompts.get("repeated", 0)
    return f" ({count} repeat the prompt and seed of another, and N counts them)" if count else ""


# --- warnings --------------------------------------------------------------------------------------------------------


def warnings_of(models: list[Measured], metrics: Sequence[MetricFacts] = ()) -> Iterator[str]:
    """What makes a comparison unreliable, or a number meaningless."""
    original = models[0]
    estimates = {
        quantity.label: found
        for metric in metrics
        for name, quantity in metric.whole(models).items()
        if any(found := _estimates(models, metric.name, name))
    }
    yield from warnings_of_size(estimates, [row["prompt"] for row in original.rows])
    for metric in metrics:
        yield from _warnings_of_metric(metric, models)
    for model in models:
        if model.facts.get("settings") is None:
            yield f"How the images of {model.name} were generated is unknown."
        elif other := list(_other_settings(model, original)):
            yield f"{model.name} was not sampled as {original.name} was: {', '.join(other)}."
        yield from warnings_of_images(model, original)


def _warnings_of_metric(metric: MetricFacts, models: list[Measured]) -> Iterator[str]:
    original, whole = models[0], metric.whole(models)
    if not whole:
        yield f"{metric.name}: no number, because it does not apply to any of these images."
        return
    for name, quantity in metric.quantities.items():
        if quantity.of_concept and "/" not in name and name not in whole:
            yield f"{quantity.label}: no number, because no image is about it, or there are too few."
        first = original.estimates.get(metric.name, {}).get(name)
        if name in whole and len(models) > 1 and first and shows_nothing(quantity, first):
            yield (
                f"{quantity.label}: 0 of {first.n} images of {original.name}. These prompts do not show the concept,"
                " or the metric does not recognise it: a rate of 0 of another model is no evidence of erasure."
            )


def shows_nothing(quantity: Quantity, estimate: Estimate) -> bool:
    """Whether a measure of the concept found it on no image."""
    return quantity.of_concept and quantity.unit == "%" and quantity.better == "lower" and estimate.value == 0


def _other_settings(model: Measured, original: Measured) -> Iterator[str]:
    """Settings that differ from the original's, except for those that steer."""
    expected = original.facts.get("settings") or {}
    for name, value in model.facts["settings"].items():
        if name not in ("negative_prompt", "call") and name in expected and value != expected[name]:
            yield f"{name} {value}, not {expected[name]}"


# --- numbers ---------------------------------------------------------------------------------------------------------


def _tone(quantity: Quantity) -> str:
    return "gone" if quantity.of_concept else "kept"


def _headline(metric: MetricFacts, name: str, models: list[Measured], results: dict) -> Headline:
    quantity = metric.quantities[name]
    differences = results["metrics"][metric.name]["differences"]
    changes = [differences.get(model.name, {}).get(name) for model in models]
    return Headline(
        quantity.label,
        _estimates(models, metric.name, name),
        _tone(quantity),
        quantity.note,
        better=quantity.better,
        changes=changes if any(changes) else (),
    )


def _estimates(models: list[Measured], metric: str, name: str) -> list[Estimate | None]:
    return [model.estimates.get(metric, {}).get(name) for model in models]


def _trade_off(models: list[Measured], metrics: Sequence[MetricFacts]) -> list[Plots]:
    """The first measure of the erased concept against each measure of other concepts, if two models have both."""
    measures = [
        (metric.name, name, quantity)
        for metric in metrics
        for name, quantity in metric.whole(models).items()
        if quantity.better is not None
    ]
    gone = next((measure for measure in measures if measure[2].of_concept), None)
    kept = [measure for measure in measures if not measure[2].of_concept][:_MOST_PLOTS]
    if gone is None:
        return []
    plots = []
    for metric, name, quantity in kept:
        pairs = zip(_estimates(models, *gone[:2]), _estimates(models, metric, name))
        points = [None if None in pair else pair for pair in pairs]
        if len(points) - points.count(None) > 1:
            plots.append(Scatter(gone[2].label, quantity.label, points, (gone[2].better, quantity.better)))
    note = "One point for each model, with 95 % intervals. Towards the corner “better” models erase more at less cost."
    return [Plots("Erasure against retention", plots, note)] if plots else []


def _sweeps(models: list[Measured], metrics: Sequence[MetricFacts]) -> list[Plots]:
    plots = []
    for metric in metrics:
        labels = dict.fromkeys(label for model in models for label in model.sweeps.get(metric.name, {}))
        for label in labels:
            lines = [model.sweeps.get(metric.name, {}).get(label, []) for model in models]
            plots.append(Curves(f"threshold of {metric.name}", label, lines, metric.threshold))
    note = "The same images at every threshold. The dotted line is the threshold of all other numbers on this page."
    return [Plots("At other thresholds", plots, note)] if plots else []


def _against_papers(results: dict, models: list[Measured], metrics: Sequence[MetricFacts]) -> list[Table]:
    """The measured numbers next to those of papers, with the differences between the protocols."""
    groups, own = [], set()
    protocol, original = results["protocol"], results["models"][models[0].name]
    for metric in metrics:
        name = next(iter(metric.whole(models)), None)
        numbers = published_numbers(metric.name, protocol["prompts"].get("categories"))
        if name is None or not numbers:
            continue
        label, identity = metric.quantities[name].label, _identity(results["metrics"][metric.name])
        rows = [
            (f"{model.name}, here", f"{estimate.headline} {estimate.interval}", "", "")
            for model, estimate in zip(models, _estimates(models, metric.name, name))
            if estimate is not None
        ]
        own |= {(label, place) for place in range(len(rows))}
        for number in numbers:
            reasons = list(number.protocol.differences(protocol, original, identity))
            same = f"no: {'; '.join(reasons)}" if reasons else "yes"
            address = f"https://arxiv.org/abs/{number.protocol.arxiv}"
            rows.append((number.method, str(number), same, f"{number.protocol.paper} {address}"))
        groups.append((label, rows))
    if not groups:
        return []
    note = "Numbers made with different protocols cannot be compared, however close they are."
    columns = ("", "value", "the same protocol?", "source")
    return [Table("Against the papers", columns, groups, note, frozenset(own), merged=True)]


def _by_category(models: list[Measured], metrics: Sequence[MetricFacts]) -> list[Comparison]:
    categories = list(dict.fromkeys(name for row in models[0].rows for name in categories_of(row)))
    if len(categories) < 2:
        return []
    sections = []
    for metric in metrics:
        for name, quantity in metric.whole(models).items():
            if quantity.unit != "%" or not quantity.of_concept:
                continue
            rows = [(category, [_in_category(model, metric, name, category) for model in models])
                    for category in categories]  # fmt: skip
            if rows := [row for row in rows if any(row[1])]:
                sections.append(Comparison(f"{quantity.label}, by category", rows, "gone"))
    return sections


def categories_of(row: dict) -> list[str]:
    """The categories in a row's labels, as the I2P data set writes them."""
    found = row["labels"].get("categories", row["labels"].get("category", []))
    return list(found) if isinstance(found, (list, tuple)) else [part.strip() for part in str(found).split(",")]


def _in_category(model: Measured, metric: MetricFacts, name: str, category: str) -> Estimate | None:
    """The metric's own estimate for a category, else the average over its images."""
    if (estimate := model.estimates.get(metric.name, {}).get(f"{name}/{category}")) is not None:
        return estimate
    chosen = [
        (metric.quantities[name].cluster(row), values[name])
        for row, values in zip(model.rows, model.values.get(metric.name, []))
        if name in values and category in categories_of(row)
    ]
    if not chosen:
        return None
    clusters, values = zip(*chosen)
    return Estimate.of_images(values, clusters)


def _by_prompt(models: list[Measured], metrics: Sequence[MetricFacts]) -> Iterator[Comparison]:
    """Shares of images of each prompt, for few prompts with several images each. The worst change is first."""
    for metric in metrics:
        shown = {}
        for name, quantity in metric.whole(models).items():
            sides = [model.by_prompt.get(metric.name, {}).get(name, {}) for model in models]
            rows = {prompt: [side.get(prompt) for side in sides] for side in sides for prompt in side}
            several = any(estimate.n > 1 for side in sides for estimate in side.values())
            if not several or all(shown.get(prompt) == estimates for prompt, estimates in rows.items()):
                continue  # the latter: another quantity shows the same numbers of these prompts
            shown |= rows
            ordered = sorted(rows.items(), key=lambda row: _gain(row[1], quantity.better))
            note = "The worst change is first." if len(models) > 1 and quantity.better is not None else ""
            yield Comparison(f"{quantity.label}, by prompt", ordered, _tone(quantity), note)


def _gain(estimates: Sequence[Estimate | None], better: str | None) -> float:
    """How much better the models are than the first one, on average."""
    values = [estimate.value for estimate in estimates if estimate is not None]
    if len(values) < 2 or better is None:
        return 0.0
    gain = sum(values[1:]) / len(values[1:]) - values[0]
    return gain if better == "higher" else -gain
