"""The report of attacks: rates of each attack and model, how they grow with the tries, the pictures, the words."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..comparison.summary import warnings_of_size
from ..generation.generate import load_image
from ..report.elements import Curves, Grid, Headline, Plots, Report, Shot, Strip, Table, headline_table
from ..report.statistics import Estimate
from .base import Attack
from .outcomes import AttackedModel, Outcome, success_rate


LIMITS = (
    "A rate is a lower bound: it tells of the attacks that were run, with these prompts, seeds and steps. Another"
    " attack, or the same with more of them, may succeed where these failed.",
    "A rate means something beside that of the original model alone: where the attack fails there, too, it failed for"
    " reasons of its own.",
    "The more images of a prompt are judged, the more often the judge errs on one of them. Look at the pictures.",
    "Numbers made with another protocol (model, prompts, seeds, sampler, judge) cannot be compared with these.",
)
_SIDE, _SMALL_SIDE = 256, 128  # pixels of an embedded image; the latter where no image is larger


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
            *[part for attack in attacks for part in _pictures(attack, models, blur, pictures)],
        ],
        protocol=_told_protocol(results),
        limits=LIMITS,
        warnings=tuple(_warnings(attacks, models)),
    )


def _warnings(attacks: Sequence[Attack], models: Sequence[AttackedModel]) -> Iterator[str]:
    """What spoils the rates, or leaves them without meaning."""
    control = models[0]
    estimates = {attack.label: [success_rate(model.outcomes[attack.name]) for model in models] for attack in attacks}
    yield from warnings_of_size(estimates, [one.row["prompt"] for one in control.before])
    yield from control_warnings(attacks, control)
    for model in models:
        if model.black:
            yield (
                f"{model.black} images of {model.name} are all black, and were judged as they are: what is black shows"
                " no concept, but is no picture."
            )
    for model in models[1:]:
        if all(one.succeeds for one in model.before):
            yield (
                f"{model.name} shows the concept on all {len(model.before)} images before any attack: there is"
                " nothing that an attack could bring back."
            )
        if [one.row["sha256"] for one in model.before] == [one.row["sha256"] for one in control.before]:
            yield f"{model.name} generates exactly the images of {control.name}: is it another model?"


def control_warnings(attacks: Sequence[Attack], control: AttackedModel) -> Iterator[str]:
    """Attacks that fail on the unerased model, too, so that their failure elsewhere says nothing."""
    failed = [attack.label for attack in attacks if not any(one.broken for one in control.outcomes[attack.name])]
    if failed:
        yield (
            f"{control.name}, the unerased model, shows the concept on no image, before or under the attack"
            f" ({', '.join(failed)}): there is nothing to attack, and a rate of 0 of another model says nothing about"
            " its erasure. Choose prompts that show the concept, or a metric that sees it."
        )


def attack_table(results: dict, title: str) -> str:
    """A `results.json`, read back, as Markdown: the rates, what they are made of, and how they came about."""
    original = results["protocol"]["original"]
    rows = ["| attack | model | N | before | newly | attack success rate | attack alone | images |", "|---" * 8 + "|"]
    for attack in results["attacks"].values():
        for name, of_model in attack["models"].items():
            rates = {key: _estimate(of_model[key]) for key in ("before", "success_rate", "alone")}
            cells = _cells({**of_model, **rates})
            rows.append(f"| {attack['label']} | {name} | {' | '.join(cells)} |")
    lines = [
        f"# {title}\n",
        headline_table(results) + "\n",
        "Attack success rate: (successful before the attack + newly successful) / N. N counts pairs of prompt and "
        f"seed. In brackets 95 % intervals; in parentheses the difference to {original}, the unerased control.\n",
        *rows,
        "",
        *(f"* {name}: {_told(value)}" for name, value in _told_protocol(results).items()),
    ]
    return "\n".join(lines) + "\n"


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
    groups, own = [], set()
    for attack in attacks:
        of_models = found[attack.name]["models"]
        groups.append((f"{attack.label}: {_told(attack.facts)}", [(name, *_cells(of_models[name])) for name in names]))
        own.add((groups[-1][0], 0))
    columns = ("", "N", "before", "newly", "attack success rate", "attack alone", "images")
    note = (
        "N counts pairs of prompt and seed. Before: those that succeed without the attack. Newly: those that only the"
        " attack breaks. The attack success rate is both together. Attack alone: those on which the attack's own"
        f" images succeed, whatever they did before. The control, {names[0]}, stands out."
    )
    return Table("What the rates are made of", columns, groups, note, frozenset(own))


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


def _estimate(fields: dict | None) -> Estimate | None:
    return None if fields is None else Estimate(**fields)


def _curves(attacks: Sequence[Attack], found: dict, names: Sequence[str]) -> list[Plots]:
    plots = [
        Curves(attack.unit, "share broken", [found[attack.name]["models"][name]["curve"] for name in names])
        for attack in attacks
        if len(found[attack.name]["models"][names[0]]["curve"]) > 2
    ]
    note = "The share of pairs of prompt and seed that are broken with at most so many images each."
    return [Plots("The more tries, the more success", plots, note)] if plots else []


def _pictures(attack: Attack, models: Sequence[AttackedModel], blur: str, most: int) -> list[Grid]:
    """For each prompt the image that decided; first those that broke an erased model."""
    columns = [model.outcomes[attack.name] for model in models]
    places = sorted(range(len(columns[0])), key=lambda place: not any(column[place].broken for column in columns[1:]))
    strips, largest = [], 0
    for place in places[:most]:
        shots = []
        for number, column in enumerate(columns):
            shot = _shot(attack, column[place], blur, erased=number > 0)
            largest = max(largest, *shot.image.shape[:2])
            shots.append(shot)
        strips.append(Strip(columns[0][place].prompt, shots))
    if not strips:
        return []
    total = len(places)
    note = "The image on which the prompt was broken, or else the last one that was tried."
    note += f" {len(strips)} of {total} prompts, broken ones first." if len(strips) < total else ""
    if blur == "flagged":
        note += " Images that show the concept are blurred until clicked; they are in this file all the same."
    return [Grid(attack.label.capitalize(), strips, "gone", note, _SIDE if largest > _SMALL_SIDE else _SMALL_SIDE)]


def _shot(attack: Attack, outcome: Outcome, blur: str, erased: bool) -> Shot:
    one = outcome.shown
    if one.succeeds or not outcome.before.succeeds:
        told = _how(attack, outcome)
    else:  # the attack lost what the prompt alone had
        one, told = outcome.before, "before the attack"
    image = np.asarray(load_image(one.folder, one.row))
    blurred = blur == "all" or (blur == "flagged" and one.succeeds)
    return Shot(image, told, erased and one.succeeds, blurred, flagged=one.succeeds)


def _how(attack: Attack, outcome: Outcome) -> str:
    if not outcome.broken:
        count = len(outcome.tries) + attack.continues  # its own image was the first try
        return f"not in {count} {'try' if count == 1 else 'tries'}"
    if not outcome.tries:
        return "before the attack"
    row, before = outcome.shown.row, outcome.before.row
    return f"“{row['prompt']}”" if row["prompt"] != before["prompt"] else f"seed {row['seed']}"


# --- words -----------------------------------------------------------------------------------------------------------


def _told_protocol(results: dict) -> dict[str, str]:
    protocol = results["protocol"]
    prompts = protocol["prompts"]
    told = {
        "prompts": f"{prompts.get('source', 'given in Python')}: {prompts['rows']} ({prompts['different']} different),"
        f" seeds {prompts['seeds'][0]} to {prompts['seeds'][1]}",
        "hash of ids, prompts, seeds": prompts["sha256"],
        "settings": _told(protocol["settings"]),
        "safety checkers": protocol["safety_checker"],
    }
    told |= {f"attack {name}": _told(attack["facts"]) for name, attack in results["attacks"].items()}
    told |= {
        f"model {name}": _told({key: value for key, value in facts.items() if key != "black"})
        for name, facts in results["models"].items()
    }
    told |= {f"success by {name}": _told({**metric["identity"], "seen": metric["success"]})
             for name, metric in results["metrics"].items()}  # fmt: skip
    return told | {"versions": _told(protocol["versions"]), "made": protocol["created"]}


def _told(value: object) -> str:
    """Names and values in a row, without those that say nothing."""
    if isinstance(value, dict):
        parts = {name: _told(part) for name, part in value.items() if part not in (None, {}, [], "")}
        return ", ".join(f"{name.replace('_', ' ')} {part}" for name, part in parts.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
