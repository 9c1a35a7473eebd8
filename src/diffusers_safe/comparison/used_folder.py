"""Checks that an output folder of an earlier run belongs to this run: the same models, prompts and settings.

A stopped run continues, and a larger run reuses what exists. A report on something else is not replaced, and images of
something else are not mixed with these.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..generation.folders import ImageFolder
from ..generation.manifest import MANIFEST, read_manifest
from ..generation.rows import GenerationSettings, PromptRow
from ..output_folders import OutputFolderError
from ..report.results import PAGE_NAME, RESULTS_NAME, TABLE_NAME
from .models import IMAGES, ModelSource, options_of, without_folder
from .protocol import prompts_digest


logger = logging.getLogger(__name__)
# What results record of a model besides its options.
_FOUND = ("pipeline", "fingerprint", "scheduler", "dtype", "device", "settings", "images", "sha256", "black")
_SETTINGS = ("num_inference_steps", "guidance_scale", "height", "width")


def report_claim(kind: str, overwrite: bool) -> dict:
    """How a comparison claims its folder, see [`claimed`]. [`check_used_folder`] compares its contents."""
    return {
        "kind": kind,
        "continues": (RESULTS_NAME, PAGE_NAME, TABLE_NAME),
        "overwrite": overwrite,
        "is_own": holds_report,
    }


def check_models_of_folder(
    models: Sequence[ModelSource | ImageFolder],
    rows: Sequence[PromptRow],
    folder: str | Path,
    settings: GenerationSettings,
    **of_attacks,
) -> dict:
    """[`check_used_folder`] for the models of a run."""
    asked, sampled = {}, {}
    for model in models:
        if not isinstance(model, ImageFolder):
            sampled[model.name] = replace(settings, **getattr(model, "changes", {}))
            asked[model.name] = options_of(model)
        elif Path(model.folder) == Path(folder) / IMAGES / model.name:
            asked[model.name] = {}
        else:
            asked[model.name] = {"images_of": without_folder(str(model.folder))}
    return check_used_folder(folder, asked, rows, sampled, **of_attacks)


def check_used_folder(
    folder: str | Path,
    asked: Mapping[str, dict],
    rows: Sequence[PromptRow],
    settings: Mapping[str, GenerationSettings],
    part: str = "",
    attacks: Mapping[str, dict] | None = None,
) -> dict:
    """Compares a run with the images and the report of an earlier run, without loading a model.

    Args:
        folder (`str` or `Path`): Output folder; need not exist.
        asked (`Mapping[str, dict]`): Model -> its options, as `results.json` records them. The first is the original.
        rows (`Sequence[PromptRow]`): What is generated with each model.
        settings (`Mapping[str, GenerationSettings]`): Model -> its sampling settings, for models that generate.
        part (`str`, defaults to `""`): Folder with the images of `rows`, in the folder of a model.
        attacks (`Mapping[str, dict]`, *optional*): Attack -> its facts, for a run of attacks.

    Returns:
        `dict`: The contents of an existing `results.json`, else `{}`.

    Raises:
        `ValueError`: If the folder holds images of other prompts or settings, or a report with models that this run
            does not have.
    """
    folder = Path(folder)
    results = _results(folder, attacks is not None)
    seen = [name for name in settings if (folder / IMAGES / name / part / MANIFEST).is_file()]
    for name in seen:
        _check_images(folder, name, part, {row.id: row for row in rows}, settings[name])
    if not results:
        return {}
    may_grow = seen and attacks is None  # the attempts of an attack depend on all of its prompts
    if not may_grow and results["protocol"]["prompts"].get("sha256") != prompts_digest(rows):
        raise _other(folder, "its report is on other prompts")
    if (original := results["protocol"].get("original")) != next(iter(asked)):
        raise _other(folder, f"its report compares with '{original}', not with '{next(iter(asked))}'")
    for name, facts in results["models"].items():
        if name not in asked:
            raise _other(folder, f"its report has a model '{name}', which is not among these")
        known = {key: value for key, value in facts.items() if key not in _FOUND}
        wanted = {key: value for key, value in asked[name].items() if key not in _FOUND}
        if "images_of" in wanted:  # the images bring the facts of their model
            known = {"images_of": known.get("images_of")}
        elif name in settings:
            known.pop("images_of", None)  # was measured with `images_only`
        else:  # images of an earlier run in this folder, with the facts of their model
            continue
        for key in {**known, **wanted}:
            if known.get(key) != wanted.get(key):
                values = [side.get(key, "not given") for side in (known, wanted)]
                raise _other(folder, f"its report is on '{name}' with {key} {values[0]}, now {values[1]}")
    for name, facts in (attacks or {}).items():
        if (known := results["attacks"].get(name, {}).get("facts", facts)) != json.loads(json.dumps(facts)):
            raise _other(folder, f"its report is on the attack '{name}' with {known}, now {facts}")
    return results


def say_what_was_replaced(folder: str | Path, before: dict[str, dict], after: dict[str, dict]) -> None:
    """Logs which numbers of an earlier report are missing or different in the new one.

    Args:
        folder (`str` or `Path`): Folder of both reports.
        before (`dict[str, dict]`): Metric or attack -> model -> numbers of the earlier report.
        after (`dict[str, dict]`): The same for the new report.
    """
    replaced = [
        name
        for name, models in before.items()
        if any(after.get(name, {}).get(model) != numbers for model, numbers in models.items())
    ]
    if replaced:
        logger.warning(
            "output_dir %s: replaced its earlier report, which had other numbers of %s; images and scores are kept",
            folder,
            ", ".join(replaced),
        )


def _results(folder: Path, attacks: bool) -> dict:
    path = folder / RESULTS_NAME
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        results = None
    if not _is_report(results):
        raise _other(folder, f"its {RESULTS_NAME} is not from an evaluation or attacks")
    if ("attacks" in results) != attacks:
        raise _other(folder, f"it holds the report of {'attacks' if 'attacks' in results else 'an evaluation'}")
    return results


def holds_report(folder: Path) -> bool:
    """Whether a folder holds the results of a comparison or of attacks."""
    path = folder / RESULTS_NAME
    try:
        return path.is_file() and _is_report(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False


def _is_report(results: object) -> bool:
    """Whether a JSON value has the parts of a report that this module reads."""

    def has(value: object, *names: str) -> bool:
        return isinstance(value, dict) and all(isinstance(value.get(name), dict) for name in names)

    of_each = ("models", "facts") if isinstance(results, dict) and "attacks" in results else ("estimates",)
    kind = "attacks" if "facts" in of_each else "metrics"
    return (
        has(results, "protocol", "models", kind)
        and has(results["protocol"], "prompts")
        and all(map(has, results["models"].values()))
        and all(has(part, *of_each) for part in results[kind].values())
    )


def _check_images(
    folder: Path, name: str, part: str, rows: Mapping[str, PromptRow], settings: GenerationSettings
) -> None:
    for known in read_manifest(folder / IMAGES / name / part):
        row = rows.get(known["id"])
        if row is None or (known["prompt"], known["seed"]) != (row.prompt, row.seed):
            raise _other(folder, f"it holds images of other prompts or seeds, such as {known['id']} of '{name}'")
        for key in _SETTINGS:
            wanted = getattr(row, key, None)
            wanted = getattr(settings, key) if wanted is None else wanted
            if (found := (known.get("settings") or {}).get(key)) != wanted:
                raise _other(folder, f"its images of '{name}' have {key} {found}, not {wanted}")


def _other(folder: Path, what: str) -> OutputFolderError:
    return OutputFolderError(f"output_dir {folder}: {what}; give another folder, or --overwrite to replace them")
