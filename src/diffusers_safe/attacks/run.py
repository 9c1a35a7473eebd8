"""Attacks on erased models, and the same attacks on the unerased model.

    models = [LoadedModel("original", pipeline), LoadedModel("erased", erased)]
    attack(models, rows, [SeedSearch(8), ConceptInversion("knife")], [Nudity()], "runs/attack")

Images are in `images/{model}/{attack}/` below the folder, with their raw scores. A stopped run continues.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..arguments import typed
from ..comparison.measured import change_of
from ..comparison.models import IMAGES, ModelSource, check_models, model_facts
from ..comparison.protocol import make_protocol
from ..comparison.used_folder import check_models_of_folder, report_claim, say_what_was_replaced
from ..generation.generate import generate
from ..generation.rows import GenerationSettings, PromptRow, check_rows
from ..metrics.base import Metric, check_once
from ..output_folders import check_output_dir, claimed
from ..progress import ProgressCallback
from ..report.builder import BLUR_CHOICES, PICTURES
from ..report.results import Results, publish
from ..values import choose
from .attack_report import attack_report, control_warnings, describe_attacks
from .base import Attack, Target
from .judge import Judge
from .outcomes import AttackedModel, Attempt, Outcome, rate_alone, rate_before, success_curve, success_rate


logger = logging.getLogger(__name__)
BEFORE = "before"  # folder of the images without an attack


@typed
def attack(
    models: Sequence[ModelSource],
    rows: Sequence[PromptRow],
    attacks: Sequence[Attack],
    metrics: Sequence[Metric],
    folder: str | Path,
    settings: GenerationSettings | None = None,
    batch_size: int = 4,
    scoring_batch_size: int = 16,
    title: str = "",
    prompts: dict | None = None,
    blur: str = "flagged",
    pictures: int = PICTURES,
    overwrite: bool = False,
    callback: ProgressCallback | None = None,
) -> Results:
    """Generates each prompt once as it is, then runs each attack, on each model; writes `results.json`, `results.md`
    and `report.html`.

    An image is a success if a metric recognises the concept on it. Safety checkers are off, because black images would
    count as failures of the attack.

    Args:
        models (`Sequence`): At least two models, each with a `name` and a `load(settings)` as in [`LoadedModel`]; the
            first is the original, unerased model: the control.
        rows (`Sequence[PromptRow]`): The attacked prompts with their seeds, at least one, with different ids.
        attacks (`Sequence[Attack]`): At least one.
        metrics (`Sequence[Metric]`): At least one that says of each image whether it shows the concept.
        folder (`str` or `Path`): Output folder. Results of an earlier run in it must be of the same models, prompts,
            settings and, under the same names, attacks; attacks can be added.
        settings (`GenerationSettings`, *optional*): Sampling settings.
        batch_size (`int`, defaults to 4): Number of images generated at once.
        scoring_batch_size (`int`, defaults to 16): Number of images scored at once.
        title (`str`, *optional*): Title of the page.
        prompts (`dict`, *optional*): Source of the rows, for the protocol.
        blur (`str`, defaults to `"flagged"`): Which images of the page are blurred until clicked: `"flagged"` (the
            successes), `"all"` or `"none"`.
        pictures (`int`, defaults to 24): Number of prompts of each attack whose images are on the page.
        overwrite (`bool`, defaults to `False`): Replace images, learned tokens and report of other prompts, models or
            settings in `folder`.
        callback (`Callable[[Progress], None]`, *optional*): Called with a [`Progress`] after each batch of
            generated or scored images. If it raises, the run ends: finished images and scores are kept, no
            report is written, and the same call continues there.

    Returns:
        `Results`: The contents of `results.json`: `protocol`; `models`, name -> facts; `attacks`, name -> `facts`,
        `prompts` (their number), and for each model `before`, `newly`, `success_rate`, `alone`, `difference` to the
        original, `curve`, `images` and `outcomes`; `report`; `headline`; `warnings`, what makes the rates unreliable.

    Raises:
        `ValueError`: If something is missing or does not fit, `folder` holds images or a report of other models,
            prompts or settings, or another run uses it. What was generated until then is kept.
    """
    check_output_dir(folder)
    folder, settings = Path(folder), settings or GenerationSettings()
    judge = check_attack(models, rows, attacks, metrics, scoring_batch_size)
    earlier = check_folder(models, rows, attacks, folder, settings, overwrite)
    blur = choose("blur", blur, BLUR_CHOICES)
    attacked = []
    with claimed(folder, **report_claim("attack", overwrite)):
        for place, model in enumerate(models):
            target = {"is_original": place == 0, "overwrite": overwrite, "callback": callback}
            attacked.append(_attack_model(model, rows, attacks, judge, folder, settings, batch_size, **target))
            gc.collect()  # frees the model before the next one is loaded
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if place == 0:  # before hours of work on the other models
                for warning in control_warnings(attacks, attacked[0]):
                    logger.warning(warning)
        results = _results(attacked, attacks, judge, rows, settings, prompts or {})
        report = attack_report(results, attacks, attacked, title, blur, pictures)
        results = publish(folder, results, report, describe_attacks)
        say_what_was_replaced(folder, _rates(earlier), _rates(results))
        return results


def check_folder(
    models: Sequence[ModelSource],
    rows: Sequence[PromptRow],
    attacks: Sequence[Attack],
    folder: str | Path,
    settings: GenerationSettings,
    overwrite: bool = False,
) -> dict:
    """Returns the results of an earlier run in the folder, if they are not replaced.

    Raises:
        `ValueError`: If it holds images or a report of other models, prompts, settings or attacks.
    """
    if overwrite:
        return {}
    facts = {attack.name: attack.facts for attack in attacks}
    return check_models_of_folder(models, rows, folder, settings, part=BEFORE, attacks=facts)


def check_attack(
    models: Sequence[ModelSource],
    rows: Sequence[PromptRow],
    attacks: Sequence[Attack],
    metrics: Sequence[Metric],
    scoring_batch_size: int = 16,
) -> Judge:
    """Checks everything that can be checked before any work. Returns the judge of the attacks.

    Raises:
        `ValueError`: As [`attack`].
    """
    check_models(models)
    if len(models) < 2:
        raise ValueError("models: there must be the original and at least one erased model")
    rows = list(rows)
    check_rows(rows)
    if not attacks:
        raise ValueError("attacks: there must be at least one")
    check_once("attack", [attack.name for attack in attacks])
    for attack in attacks:
        attack.check(rows)
        if not attack.targets(rows):
            raise ValueError(f"attack '{attack.name}': applies to none of the {len(rows)} prompts")
    judge = Judge(metrics, scoring_batch_size)
    judge.check(rows)
    return judge


# --- attacks ---------------------------------------------------------------------------------------------------------


def _attack_model(
    model: ModelSource,
    rows: Sequence[PromptRow],
    attacks: Sequence[Attack],
    judge: Judge,
    folder: Path,
    settings: GenerationSettings,
    batch_size: int,
    **of_target,
) -> AttackedModel:
    pipeline, own_settings = model.load(settings)
    target = Target(model.name, pipeline, own_settings, folder, batch_size, **of_target)
    before = _generate(target, rows, BEFORE, judge, f"{BEFORE} attacks on {target.name}")
    by_id = dict(zip((row.id for row in rows), before))
    outcomes = {attack.name: run_attack(attack, target, rows, by_id, judge) for attack in attacks}
    facts = model_facts(model, pipeline, before[0].row["model"])
    return AttackedModel(model.name, {**facts, "settings": before[0].row["settings"]}, before, outcomes)


def run_attack(
    attack: Attack, target: Target, rows: Sequence[PromptRow], before: dict[str, Attempt], judge: Judge
) -> list[Outcome]:
    """Runs an attack on one model: attempt after attempt, on each prompt until one succeeds.

    Args:
        attack ([`Attack`]): The attack.
        target ([`Target`]): The model.
        rows (`Sequence[PromptRow]`): All prompts; those that the attack does not apply to are left out.
        before (`dict[str, Attempt]`): A row's id -> its image without an attack.
        judge ([`Judge`]): Decides what succeeds.
    """
    chosen = attack.targets(rows)
    outcomes = [Outcome(before[row.id]) for row in chosen]
    tries = [attack.tries(row) for row in chosen]
    with attack.on(target, rows):
        for number in range(max(map(len, tries), default=0)):
            waiting = [
                place
                for place, outcome in enumerate(outcomes)
                if number < len(tries[place])
                and not outcome.by_attack
                and not (attack.continues and outcome.before.succeeds)
            ]
            if not waiting:
                break
            task = f"{attack.name} on {target.name}, attempt {number + 1}"
            attempts = _generate(target, [tries[place][number] for place in waiting], attack.name, judge, task)
            for place, attempt in zip(waiting, attempts):
                outcomes[place].tries.append(attempt)
    return outcomes


def _generate(target: Target, rows: Sequence[PromptRow], name: str, judge: Judge, task: str) -> list[Attempt]:
    folder = target.folder / IMAGES / target.name / name
    manifest = generate(
        target.pipeline,
        list(rows),
        folder,
        target.settings,
        target.batch_size,
        task,
        overwrite=target.overwrite,
        callback=target.callback,
    )
    return judge.judge(folder, manifest, target.callback)


# --- results ---------------------------------------------------------------------------------------------------------


def _results(
    models: Sequence[AttackedModel],
    attacks: Sequence[Attack],
    judge: Judge,
    rows: Sequence[PromptRow],
    settings: GenerationSettings,
    prompts: dict,
) -> dict:
    return {
        "protocol": make_protocol(rows, prompts, {"rows": len(rows)}, asdict(settings), models[0].name, "off"),
        "models": {model.name: {**model.facts, "black": model.black} for model in models},
        "metrics": {
            metric.name: {"identity": metric.identity(), "success": list(judge.shares[metric.name].values())}
            for metric in judge.metrics
        },
        "attacks": {attack.name: _attack_results(attack, models, rows) for attack in attacks},
    }


def _attack_results(attack: Attack, models: Sequence[AttackedModel], rows: Sequence[PromptRow]) -> dict:
    chosen = attack.targets(rows)
    most = max(len(attack.tries(row)) for row in chosen)
    return {
        "label": attack.label,
        "facts": attack.facts,
        "prompts": len(chosen),
        "models": {model.name: _model_results(attack, model, models[0], most) for model in models},
    }


def _model_results(attack: Attack, model: AttackedModel, original: AttackedModel, most: int) -> dict:
    outcomes = model.outcomes[attack.name]
    first = int(attack.continues)
    found = {
        "before": rate_before(outcomes),
        "newly": sum(outcome.newly for outcome in outcomes),
        "success_rate": success_rate(outcomes),
        "alone": None if attack.continues else rate_alone(outcomes),
        "curve": success_curve(outcomes, first, most + first),
        "images": sum(len(outcome.tries) for outcome in outcomes),
        "outcomes": [_outcome_results(outcome) for outcome in outcomes],
    }
    if model is not original:
        sides = [
            [float(outcome.broken) for outcome in attacked.outcomes[attack.name]] for attacked in (original, model)
        ]
        found["difference"] = change_of(*sides, [outcome.prompt for outcome in outcomes], "%")
    return found


def _outcome_results(outcome: Outcome) -> dict:
    row = outcome.before.row
    last = outcome.tries[-1].row if outcome.by_attack else None
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "seed": row["seed"],
        "before": outcome.before.succeeds,
        "broken_at": outcome.broken_at,
        "tries": len(outcome.tries),
        "by": last and {"prompt": last["prompt"], "seed": last["seed"], "file": last["file"]},
    }


def _rates(results: dict) -> dict[str, dict]:
    return {
        name: {model: found["success_rate"] for model, found in attack["models"].items()}
        for name, attack in results.get("attacks", {}).items()
    }
