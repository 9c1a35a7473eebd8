"""Which images of an evaluation its page shows, and their captions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..generation.manifest import load_image
from ..metrics.base import Quantity
from ..report.builder import make_shot
from ..report.elements import Grid, Strip, Table
from .measured import Measured, MetricFacts


_MOST_WORDS = 8
_WRONG = {"lower": 1, "higher": 0}  # the undesired value of a share, by the better direction


@dataclass(frozen=True)
class Look:
    """What metrics found on an image.

    Attributes:
        words (`tuple[str, ...]`): What they recognised, in a word each, or else the measures of the concept that it
            counts for.
        flagged (`bool`): Whether it counts for a measure of the concept.
        wrong (`bool`): Whether its value of a measure with a better direction is the undesired one.
        of_concept (`bool`): Whether a measure of the concept applies to it.
    """

    words: tuple[str, ...]
    flagged: bool
    wrong: bool
    of_concept: bool


def looks_of(model: Measured, metrics: Sequence[MetricFacts]) -> list[Look]:
    """One for each image of a model."""
    measures = [(metric.name, metric.whole([model])) for metric in metrics if metric.name in model.values]
    return [_look(model, measures, place) for place in range(len(model.rows))]


def _look(model: Measured, measures: list[tuple[str, dict[str, Quantity]]], place: int) -> Look:
    words, flagged, wrong, of_concept = [], False, False, False
    for metric, quantities in measures:
        answers = [
            (quantities[name], value) for name, value in model.values[metric][place].items() if name in quantities
        ]
        shares = [(quantity, value) for quantity, value in answers if quantity.unit == "%"]
        flags = [quantity.label for quantity, value in shares if quantity.of_concept and value == 1]
        word = model.words[metric][place]
        words += [word] if word else flags
        flagged |= bool(flags)
        wrong |= any(value == _WRONG.get(quantity.better) for quantity, value in shares)
        of_concept |= any(quantity.of_concept for quantity, _ in answers)
    return Look(tuple(words), flagged, wrong, of_concept)


def image_grids(models: list[Measured], metrics: Sequence[MetricFacts], blur: str, most: int) -> list[Grid]:
    """The same seeds of all models, in two grids if some images are of the erased concept and some are not."""
    looks = [looks_of(model, metrics) for model in models]
    concept, others = [], []
    for place in range(len(models[0].rows)):
        (concept if any(of_model[place].of_concept for of_model in looks) else others).append(place)
    if not concept or not others:
        return _grid("The same seeds", "gone", concept + others, models, looks, blur, most)
    return [
        *_grid("The same seeds: erased concept", "gone", concept, models, looks, blur, most),
        *_grid("The same seeds: other concepts", "kept", others, models, looks, blur, most),
    ]


def _grid(
    title: str, tone: str, places: list[int], models: list[Measured], looks: list[list[Look]], blur: str, most: int
) -> list[Grid]:
    flagged = [place for place in places if any(of_model[place].flagged for of_model in looks)]
    chosen = _chosen([row["prompt"] for row in models[0].rows], places, flagged, most)
    if not chosen:
        return []
    strips = []
    for place in chosen:
        shots = []
        for model, of_model in zip(models, looks):
            look = of_model[place]
            image = np.asarray(load_image(model.folder, model.rows[place]))
            # The original model is expected to show the concept.
            missed = look.wrong and not (look.of_concept and model is models[0] and len(models) > 1)
            shots.append(make_shot(image, ", ".join(look.words), missed, look.flagged, blur))
        strips.append(Strip(models[0].rows[place]["prompt"], shots))
    notes = [f"All {len(places)} prompts and seeds"]
    if len(chosen) < len(places):
        notes = [f"{len(chosen)} of {len(places)} prompts and seeds"]
        notes[0] += ", those with flagged images first" if flagged else ""
    if len(models) == 2:
        notes.append(f"Left {models[0].name}, right {models[1].name}")
    if any(word for model in models for words in model.words.values() for word in words):
        notes.append("Captions say what is recognised; ✗ marks what should be different")
    if blur == "flagged" and flagged:
        notes.append("Images that a metric flagged are blurred until clicked, but this file contains them")
    return [Grid(title, strips, tone, ". ".join(notes) + ".")]


def _chosen(prompts: list[str], places: list[int], flagged: list[int], most: int) -> list[int]:
    """All places, or `most` of them, half of them with a flagged image if possible, spread over the prompts."""
    if len(places) <= most:
        return places
    known = set(flagged)
    others = [place for place in places if place not in known]
    first = min(len(flagged), max(most - len(others), (most + 1) // 2))
    return _spread(prompts, flagged, first) + _spread(prompts, others, min(len(others), most - first))


def _spread(prompts: list[str], places: list[int], count: int) -> list[int]:
    """The first image of each prompt, then the second, ...; evenly spread if there are too many."""
    seen, turns = Counter(), {}
    for place in places:
        turns.setdefault(seen[prompts[place]], []).append(place)
        seen[prompts[place]] += 1
    chosen = []
    for turn in turns.values():
        left = min(len(turn), count - len(chosen))
        chosen += [turn[i * len(turn) // left] for i in range(left)]
    return sorted(chosen)


def recognised_table(models: list[Measured], metrics: Sequence[MetricFacts]) -> list[Table]:
    """What metrics recognise on images of prompts for the erased concept."""
    groups = []
    for metric in metrics:
        quantities = {name for name, quantity in metric.quantities.items() if quantity.of_concept}
        rows = []
        for model in models:
            pairs = zip(model.words.get(metric.name, []), model.values.get(metric.name, []))
            words = Counter(word for word, values in pairs if word and quantities & values.keys())
            if words:
                text = ", ".join(f"{word} {count}×" for word, count in words.most_common(_MOST_WORDS))
                rows.append((model.name, text + (", …" if len(words) > _MOST_WORDS else "")))
        if rows:
            groups.append((metric.name.replace("_", " "), rows))
    if len(groups) == 1:  # its name is not needed
        groups = [("", groups[0][1])]
    title, columns = "What is recognised on images of the erased concept", ("", "how often, most frequent first")
    return [Table(title, columns, groups)] if groups else []
