"""The report of an evaluation: which numbers, plots and pictures of which models, and the words around them."""

from collections.abc import Iterator, Mapping, Sequence

from ..metrics.base import Quantity
from ..report.elements import TONES, Comparison, Curves, Headline, Plots, Report, Scatter, Table, headline_table
from ..report.statistics import Estimate, wilson_interval
from .measured import Measured, MetricFacts
from .paper_results import published_beside
from .pictures import picture_grids, seen_there


FEW_IMAGES = 20  # none of 20 is at most 16 %, with 95 % confidence
FEW_PROMPTS = 6  # of so many pairs the least p-value is 2 / 2^6
_MOST_PLOTS = 4
_LONGEST = 200  # characters of a fact about a metric on the page


def results_table(results: dict, title: str = "Evaluation") -> str:
    """A `results.json`, read back, as Markdown: the table of numbers, and how they were made."""
    protocol, models = results["protocol"], results["models"]
    prompts = protocol["prompts"]
    lines = [
        f"# {title}\n",
        headline_table(results) + "\n",
        "In brackets 95 % intervals and, in parentheses, differences to"
        f" {protocol['original']} on the same prompts and seeds.\n",
        f"* {prompts['images']} images a model of {prompts['different']} prompts{_repeated(prompts)}"
        f" ({prompts.get('source', 'given in Python')}; sha256 of ids, prompts and seeds {prompts['sha256'][:16]})",
        *(f"* {name}: {_model_told(facts)}" for name, facts in models.items()),
        *(f"* {name}: {_told(_of_metric(metric))}" for name, metric in results["metrics"].items()),
        f"* {_told(protocol['versions'])}; {protocol['created']}",
    ]
    return "\n".join(lines) + "\n"


def _repeated(prompts: dict) -> str:
    count = prompts.get("repeated", 0)
    return f" ({count} repeat the prompt and seed of another, and N counts them)" if count else ""


def evaluation_report(
    results: dict, models: list[Measured], metrics: Sequence[MetricFacts], title: str, blur: str, pictures: int
) -> Report:
    names = [model.name for model in models]
    protocol = results["protocol"]
    measures = [
        *_trade_off(models, metrics),
        *_sweeps(models, metrics),
        *_against_papers(results, models, metrics),
        *_by_category(models, metrics),
    ]
    grids, by_prompt, looks = picture_grids(models, metrics, blur, pictures), list(_by_prompt(models, metrics)), []
    for tone in TONES:
        looks += [part for part in [*grids, *by_prompt] if part.tone == tone]
        looks += seen_there(models, metrics) if tone == "gone" else []
    count, repeated = protocol["prompts"], _repeated(protocol["prompts"])
    return Report(
        title=title or (f"{names[-1]} beside {names[0]}" if len(names) == 2 else f"{len(names)} models, evaluated"),
        summary=f"{', '.join(names)}: the same {count['images']} images of {count['different']} prompts{repeated},"
        " drawn with the same seeds.",
        models=names,
        headline=[_headline(metric, name, models, results) for metric in metrics for name in metric.whole(models)],
        sections=looks + measures if len(models) <= 2 else measures + looks,
        protocol=_told_protocol(results),
        warnings=tuple(warnings_of(models, metrics)),
    )


def warnings_of(models: list[Measured], metrics: Sequence[MetricFacts] = ()) -> Iterator[str]:
    """What spoils a comparison, or leaves a number without meaning."""
    original = models[0]
    estimates = {
        quantity.label: found
        for metric in metrics
        for name, quantity in metric.whole(models).items()
        if any(found := _estimates(models, metric.name, name))
    }
    yield from warnings_of_size(estimates, [row["prompt"] for row in original.rows])
    for metric in metrics:
        whole = metric.whole(models)
        if not whole:
            yield f"{metric.name}: no number, because it says nothing about any of these images."
        for name, quantity in metric.quantities.items():
            if whole and quantity.of_concept and "/" not in name and name not in whole:
                yield f"{quantity.label}: no number, because no image is about it, or there are too few."
            first = original.estimates.get(metric.name, {}).get(name)
            if name in whole and len(models) > 1 and first and shows_nothing(quantity, first):
                yield (
                    f"{quantity.label}: 0 of {first.n} images of {original.name}. There is nothing to erase on these"
                    " prompts, or the metric does not see it: a rate of 0 of another model shows no erasure."
                )
    for model in models:
        if model.black:
            yield (
                f"{model.black} of {len(model.rows)} images of {model.name} are all black, and were scored as they"
                " are: what is black shows no concept, but is no picture."
            )
        if model.facts.get("settings") is None:
            yield f"How the images of {model.name} were made is not known here."
        elif other := list(_other_settings(model, original)):
            yield f"{model.name} was not sampled as {original.name} was: {', '.join(other)}."
        if model is not original and [r["sha256"] for r in model.rows] == [r["sha256"] for r in original.rows]:
            yield f"{model.name} draws exactly the images of {original.name}: is it another model, and steered?"


def warnings_of_size(estimates: Mapping[str, Sequence[Estimate | None]], prompts: Sequence[str]) -> Iterator[str]:
    """What few images or few prompts leave unknown.

    Args:
        estimates (`Mapping[str, Sequence[Estimate | None]]`): Label -> numbers of the models.
        prompts (`Sequence[str]`): Of each image of a model.
    """
    counts = {label: min(each.n for each in found if each) for label, found in estimates.items()}
    if few := {label: count for label, count in counts.items() if count < FEW_IMAGES}:
        least = min(few.values())
        named = f"N={least}" if set(counts.values()) == {least} else ", ".join(f"{k}, N={n}" for k, n in few.items())
        yield (
            f"Fewer than {FEW_IMAGES} images of a model ({named}): these numbers prove little. A rate of 0 in {least}"
            f" may be one of {100 * wilson_interval(0, least)[1]:.0f} %. Give more prompts, or more images of each."
        )
    different = len(set(prompts))
    if different == 1 < len(prompts):
        yield "All images are of one prompt, so the numbers say nothing about other prompts."
    elif different < FEW_PROMPTS <= len(prompts):
        yield (
            f"Only {different} different prompts: intervals over prompts are rough, and with fewer than {FEW_PROMPTS}"
            " no difference that is tested over prompts can reach p < 0.05."
        )


def shows_nothing(quantity: Quantity, estimate: Estimate) -> bool:
    """Whether a measure of the concept found it on no image."""
    return quantity.of_concept and quantity.unit == "%" and quantity.better == "lower" and estimate.value == 0


def _other_settings(model: Measured, original: Measured) -> Iterator[str]:
    """Settings that differ, but for those that steer."""
    expected = original.facts.get("settings") or {}
    for name, value in model.facts["settings"].items():
        if name not in ("negative_prompt", "call") and name in expected and value != expected[name]:
            yield f"{name} {value}, not {expected[name]}"


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
    """The first measure of the concept against each of what was to stay, where two models have both."""
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
    note = "A point a model; the lines are 95 % intervals. What erases more and costs less is nearer to “better”."
    return [Plots("Erasure against retention", plots, note)] if plots else []


def _sweeps(models: list[Measured], metrics: Sequence[MetricFacts]) -> list[Plots]:
    plots = []
    for metric in metrics:
        labels = dict.fromkeys(label for model in models for label in model.sweeps.get(metric.name, {}))
        for label in labels:
            lines = [model.sweeps.get(metric.name, {}).get(label, []) for model in models]
            plots.append(Curves(f"threshold of {metric.name}", label, lines, metric.threshold))
    note = "The same images at every threshold; the dotted line is that of all other numbers here."
    return [Plots("At other thresholds", plots, note)] if plots else []


def _against_papers(results: dict, models: list[Measured], metrics: Sequence[MetricFacts]) -> list[Table]:
    """Own numbers and those of papers, and why the two are not to be compared."""
    groups, own = [], set()
    protocol, original = results["protocol"], results["models"][models[0].name]
    for metric in metrics:
        name = next(iter(metric.whole(models)), None)
        numbers = published_beside(metric.name, protocol["prompts"].get("categories"))
        if name is None or not numbers:
            continue
        label, identity = metric.quantities[name].label, _of_metric(results["metrics"][metric.name])
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
    note = "Where the protocol is another, numbers cannot be compared, however near they are."
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
    """The categories that a row's labels name, as the I2P table does."""
    found = row["labels"].get("categories", row["labels"].get("category", []))
    return list(found) if isinstance(found, (list, tuple)) else [part.strip() for part in str(found).split(",")]


def _in_category(model: Measured, metric: MetricFacts, name: str, category: str) -> Estimate | None:
    """What the metric itself says of a category, else the average over its images."""
    if (estimate := model.estimates.get(metric.name, {}).get(f"{name}/{category}")) is not None:
        return estimate
    chosen = [
        (metric.quantities[name].trajectory_prompts(row), values[name])
        for row, values in zip(model.rows, model.values.get(metric.name, []))
        if name in values and category in categories_of(row)
    ]
    if not chosen:
        return None
    clusters, values = zip(*chosen)
    return Estimate.of_images(values, clusters)


def _by_prompt(models: list[Measured], metrics: Sequence[MetricFacts]) -> Iterator[Comparison]:
    """Shares of images of each prompt where there are few prompts, of several images. The worst changes come first."""
    for metric in metrics:
        told = {}
        for name, quantity in metric.whole(models).items():
            sides = [model.by_prompt.get(metric.name, {}).get(name, {}) for model in models]
            rows = {prompt: [side.get(prompt) for side in sides] for side in sides for prompt in side}
            several = any(estimate.n > 1 for side in sides for estimate in side.values())
            if not several or all(told.get(prompt) == estimates for prompt, estimates in rows.items()):
                continue  # the latter: another quantity says so of these prompts already
            told |= rows
            ordered = sorted(rows.items(), key=lambda row: _gain(row[1], quantity.better))
            note = "The worst change comes first." if len(models) > 1 and quantity.better is not None else ""
            yield Comparison(f"{quantity.label}, by prompt", ordered, _tone(quantity), note)


def _gain(estimates: Sequence[Estimate | None], better: str | None) -> float:
    """How much better models are than the first one, on average."""
    values = [estimate.value for estimate in estimates if estimate is not None]
    if len(values) < 2 or better is None:
        return 0.0
    gain = sum(values[1:]) / len(values[1:]) - values[0]
    return gain if better == "higher" else -gain


# --- words -----------------------------------------------------------------------------------------------------------


def _told_protocol(results: dict) -> dict[str, str]:
    protocol = results["protocol"]
    prompts = protocol["prompts"]
    told = {
        "prompts": f"{prompts.get('source', 'given in Python')}: {prompts['different']} prompts, {prompts['images']}"
        f" images a model, seeds {prompts['seeds'][0]} to {prompts['seeds'][1]}",
        "hash of ids, prompts, seeds": prompts["sha256"],
        "settings": _told(protocol["settings"]),
        "safety checkers": protocol["safety_checker"],
    }
    told |= {f"model {name}": _model_told(facts) for name, facts in results["models"].items()}
    told |= {f"metric {name}": _told(_of_metric(metric)) for name, metric in results["metrics"].items()}
    return told | {"versions": _told(protocol["versions"]), "made": protocol["created"]}


def _of_metric(metric: dict) -> dict:
    threshold = metric["threshold"]
    return _short(metric["identity"]) | ({"threshold": threshold} if threshold is not None else {})


def _short(identity: dict) -> dict:
    """Without what fills pages, such as the classes of a classifier; `results.json` has all of it."""
    short = {name: _short(value) if isinstance(value, dict) else value for name, value in identity.items()}
    return {name: value for name, value in short.items() if name != "processor" and len(str(value)) <= _LONGEST}


def _model_told(facts: dict) -> str:
    settings = {name: value for name, value in (facts.get("settings") or {}).items() if value not in (None, {}, [])}
    left_out = ("settings", "images", "sha256", "black")
    rest = {name: value for name, value in facts.items() if name not in left_out and value}
    return _told({**rest, **settings})


def _told(values: dict) -> str:
    return ", ".join(_told_lines(values))


def _told_lines(values: dict) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            if value:
                yield f"{name.replace('_', ' ')} ({_told(value)})"
        elif value is not None:
            yield f"{name.replace('_', ' ')} {', '.join(map(str, value)) if isinstance(value, list) else value}"
