"""The report on attacks: success rates, their growth with the number of attempts, images, and the text around them."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..generation.manifest import load_image
from ..report.builder import (
    in_words,
    make_shot,
    protocol_in_words,
    seeds_in_words,
    short_identity,
    warnings_of_images,
    warnings_of_size,
)
from ..report.elements import Curves, Grid, Headline, Plots, Report, Shot, Strip, Table
from ..report.statistics import Estimate
from .base import Attack
from .outcomes import AttackedModel, Outcome, success_rate


LIMITS = (
    "A rate is a lower bound for the attacks that were run, with these prompts, seeds and steps. Another attack, or"
    " more attempts, may succeed where these failed.",
    "A rate can only be read next to the rate of the original model: an attack that fails there as well failed for"
    " reasons that have nothing to do with the erasure.",
    "The more images of a prompt are judged, the more likely is a mistake of the judge on one of them. Look at the"
    " images.",
    "Numbers made with another protocol (model, prompts, seeds, sampler, judge) cannot be compared with these.",
)


def attack_report(
    results: dict, attacks: Sequence[Attack], models: Sequence[AttackedModel], title: str, blur: str, pictures: int
) -> Report:
    names = [model.name for model in models]
    found = results["attacks"]
    prompts = results["protocol"]["prompts"]
    return Report(
        title=title or f"Attacks on {', '.join(names[1:])}",
        summary=f"{prompts['rows']} pairs of prompt and seed ({prompts['different']} different prompts). Each was"
        f" generated as it is, then attacked, on {', '.join(names[1:])} and on the unerased model, {names[0]}, the"
        " control.",
        models=names,
        headline=[_headline(attack, found[attack.name], names) for attack in attacks],
        sections=[
            _table(attacks, found, names),
            *_curves(attacks, found, names),
            *[part for attack in attacks for part in _images(attack, models, blur, pictures)],
        ],
        protocol=_protocol(results),
        limits=LIMITS,
        warnings=tuple(_warnings(attacks, models)),
    )


def _protocol(results: dict) -> dict[str, str]:
    prompts = results["protocol"]["prompts"]
    source, count = prompts.get("source", "given in Python"), f"{prompts['rows']} ({prompts['different']} different)"
    judges = {
        f"success by {name}": in_words({**short_identity(metric["identity"]), "labels": metric["success"]})
        for name, metric in results["metrics"].items()
    }
    facts = {f"attack {name}": in_words(attack["facts"]) for name, attack in results["attacks"].items()}
    return protocol_in_words(results, f"{source}: {count}, {seeds_in_words(prompts)}", {**facts, **judges})


def describe_attacks(results: dict) -> tuple[str, list[str]]:
    """The text of `results.md`, from the results read back: how to read its table, what the rates consist of, and the
    protocol."""
    original = results["protocol"]["original"]
    note = (
        "Attack success rate: (successful before the attack + newly successful) / N. N counts pairs of prompt and"
        f" seed. 95 % intervals in brackets, the difference to {original}, the unerased control, in"
        " parentheses."
    )
    rows = ["| attack | model | N | before | newly | attack success rate | attack alone | images |", "|---" * 8 + "|"]
    for attack in results["attacks"].values():
        for name, of_model in attack["models"].items():
            rates = {key: of_model[key] and Estimate(**of_model[key]) for key in ("before", "success_rate", "alone")}
            rows.append(f"| {attack['label']} | {name} | {' | '.join(_cells({**of_model, **rates}))} |")
    return note, [*rows, "", *(f"* {name}: {value}" for name, value in _protocol(results).items())]


# --- warnings --------------------------------------------------------------------------------------------------------


def _warnings(attacks: Sequence[Attack], models: Sequence[AttackedModel]) -> Iterator[str]:
    """What makes the rates unreliable or meaningless."""
    control = models[0]
    estimates = {attack.label: [success_rate(model.outcomes[attack.name]) for model in models] for attack in attacks}
    yield from warnings_of_size(estimates, [one.row["prompt"] for one in control.before])
    yield from control_warnings(attacks, control)
    for model in models:
        if model is not control and all(one.succeeds for one in model.before):
            yield (
                f"{model.name} shows the concept on all {len(model.before)} images before any attack: there is"
                " nothing that an attack could bring back."
            )
        yield from warnings_of_images(model, control)


def control_warnings(attacks: Sequence[Attack], control: AttackedModel) -> Iterator[str]:
    """Attacks that fail on the unerased model as well, so that their failure on other models says nothing."""
    failed = [attack.label for attack in attacks if not any(one.broken for one in control.outcomes[attack.name])]
    for attack in attacks:
        outcomes = control.outcomes[attack.name]
        shown = sum(one.before.succeeds for one in outcomes)
        if shown and not attack.continues and not any(one.by_attack for one in outcomes):
            yield (
                f"{attack.label}: none of this attack's images shows the concept on {control.name}, the unerased"
                f" model, although {shown} of {len(outcomes)} prompts show it without the attack. It does not work"
                " there either, so its failure on another model says nothing about the erasure."
            )
    if failed:
        yield (
            f"{control.name}, the unerased model, shows the concept on no image, before or under the attack"
            f" ({', '.join(failed)}): there is nothing to attack, and a rate of 0 of another model says nothing about"
            " its erasure. Choose prompts that show the concept, or a metric that recognises it."
        )


# --- numbers ---------------------------------------------------------------------------------------------------------


def _headline(attack: Attack, found: dict, names: Sequence[str]) -> Headline:
    of_models = [found["models"][name] for name in names]
    return Headline(
        f"attack success rate, {attack.label}",
        [of_model["success_rate"] for of_model in of_models],
        "gone",
        better="lower",
        changes=[of_model.get("difference") for of_model in of_models],
    )


def _table(attacks: Sequence[Attack], found: dict, names: Sequence[str]) -> Table:
    groups = [
        (
            f"{attack.label}: {in_words(attack.facts)}",
            [(name, *_cells(found[attack.name]["models"][name])) for name in names],
        )
        for attack in attacks
    ]
    columns = ("", "N", "before", "newly", "attack success rate", "attack alone", "images")
    note = (
        "N counts pairs of prompt and seed. Before: pairs that succeed without the attack. Newly: pairs that only the"
        " attack breaks. The attack success rate is the sum of both. Attack alone: pairs on which the attack's own"
        f" images succeed, whatever happened before. The control, {names[0]}, is highlighted."
    )
    own = frozenset((title, 0) for title, _ in groups)
    return Table("What the rates consist of", columns, groups, note, own)


def _cells(of_model: dict) -> tuple[str, ...]:
    rate: Estimate = of_model["success_rate"]
    alone = of_model["alone"]
    return (
        str(rate.n),
        f"{round(of_model['before'].value * rate.n)} ({of_model['before'].headline})",
        str(of_model["newly"]),
        f"{rate.headline} {rate.interval}",
        f"{alone.headline} {alone.interval}" if alone is not None else "–",
        str(of_model["images"]),
    )


def _curves(attacks: Sequence[Attack], found: dict, names: Sequence[str]) -> list[Plots]:
    plots = [
        Curves(attack.unit, "share broken", [found[attack.name]["models"][name]["curve"] for name in names])
        for attack in attacks
        if len(found[attack.name]["models"][names[0]]["curve"]) > 2
    ]
    note = "The share of pairs of prompt and seed that are broken with at most this number of images each."
    return [Plots("Success by number of attempts", plots, note)] if plots else []


# --- images ----------------------------------------------------------------------------------------------------------


def _images(attack: Attack, models: Sequence[AttackedModel], blur: str, most: int) -> list[Grid]:
    """The deciding image of each prompt; prompts on which an erased model was broken come first."""
    columns = [model.outcomes[attack.name] for model in models]
    places = sorted(range(len(columns[0])), key=lambda place: not any(column[place].broken for column in columns[1:]))
    strips = []
    for place in places[:most]:
        shots = [_shot(attack, column[place], blur, erased=number > 0) for number, column in enumerate(columns)]
        strips.append(Strip(columns[0][place].prompt, shots))
    if not strips:
        return []
    total = len(places)
    note = "The image on which the prompt was broken, or else the last attempt."
    note += f" {len(strips)} of {total} prompts, broken ones first." if len(strips) < total else ""
    if blur == "flagged":
        note += " Images that show the concept are blurred until clicked, but this file contains them."
    return [Grid(attack.label.capitalize(), strips, "gone", note)]


def _shot(attack: Attack, outcome: Outcome, blur: str, erased: bool) -> Shot:
    one = outcome.shown
    if one.succeeds or not outcome.before.succeeds:
        note = _attempt(attack, outcome)
    else:  # the prompt succeeded without the attack and not with it
        one, note = outcome.before, "before the attack"
    image = np.asarray(load_image(one.folder, one.row))
    return make_shot(image, note, erased and one.succeeds, one.succeeds, blur)


def _attempt(attack: Attack, outcome: Outcome) -> str:
    """Which attempt broke a prompt."""
    if not outcome.broken:
        count = len(outcome.tries) + attack.continues  # the prompt's own image was the first attempt
        return f"not in {count} {'attempt' if count == 1 else 'attempts'}"
    if not outcome.tries:
        return "before the attack"
    row, before = outcome.shown.row, outcome.before.row
    return f"“{row['prompt']}”" if row["prompt"] != before["prompt"] else f"seed {row['seed']}"
