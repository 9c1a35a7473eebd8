"""Whether an output folder that was used before belongs to this run: the same models, prompts and settings.

A stopped run continues and a larger one takes what is there; a report of something else is never replaced, and images
of something else never join these.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..generation.generate import MANIFEST, GenerationSettings, PromptRow, read_manifest
from ..output_folders import OutputFolderError
from ..report.elements import RESULTS_NAME


logger = logging.getLogger(__name__)
IMAGES = "images"  # of the models, in an output folder
# What results say of a model beside how it was asked for.
_FOUND = ("pipeline", "fingerprint", "scheduler", "dtype", "device", "settings", "images", "sha256", "black")
_SETTINGS = ("num_inference_steps", "guidance_scale", "height", "width")


def check_used_folder(
    folder: str | Path,
    asked: Mapping[str, dict],
    rows: Sequence[PromptRow],
    settings: Mapping[str, GenerationSettings],
    part: str = "",
    attacks: Mapping[str, dict] | None = None,
) -> dict:
    """Compares a run with the images and the report of an earlier one, without loading a model.

    Args:
        folder (`str` or `Path`): Of the run; need not exist.
        asked (`Mapping[str, dict]`): Model -> how it is asked for, as `results.json` records it. The first is the
            original.
        rows (`Sequence[PromptRow]`): What is generated with each model.
        settings (`Mapping[str, GenerationSettings]`): Model -> how it is sampled, of those that generate.
        part (`str`, defaults to `""`): Folder of the images of `rows` below that of a model.
        attacks (`Mapping[str, dict]`, *optional*): Attack -> its facts, if the run is one of attacks.

    Returns:
        `dict`: The `results.json` that is there; `{}` if there is none.

    Raises:
        `ValueError`: If the folder holds images of other prompts or settings, or a report that this run does not
            contain.
    """
    folder = Path(folder)
    results = _results(folder, attacks is not None)
    seen = [name for name in settings if (folder / IMAGES / name / part / MANIFEST).is_file()]
    for name in seen:
        _check_images(folder, name, part, {row.id: row for row in rows}, settings[name])
    if not results:
        return {}
    may_grow = seen and attacks is None  # the tries of an attack depend on all of its prompts
    if not may_grow and results["protocol"]["prompts"].get("sha256") != prompts_digest(rows):
        raise _other(folder, "its report is of other prompts")
    if (original := results["protocol"].get("original")) != next(iter(asked)):
        raise _other(folder, f"its report compares with '{original}', not with '{next(iter(asked))}'")
    for name, facts in results["models"].items():
        if name not in asked:
            raise _other(folder, f"its report has a model '{name}', which is not among these")
        known = {key: value for key, value in facts.items() if key not in _FOUND}
        wanted = {key: value for key, value in asked[name].items() if key not in _FOUND}
        if "images_of" in wanted:  # such images bring what is known of their model
            known = {"images_of": known.get("images_of")}
        elif name in settings:
            known.pop("images_of", None)  # measured by `images_only`
        else:  # images of an earlier run here, with what is known of their model
            continue
        for key in {**known, **wanted}:
            if known.get(key) != wanted.get(key):
                told = [side.get(key, "not given") for side in (known, wanted)]
                raise _other(folder, f"its report is of '{name}' with {key} {told[0]}, now {told[1]}")
    for name, facts in (attacks or {}).items():
        if (known := results["attacks"].get(name, {}).get("facts", facts)) != json.loads(json.dumps(facts)):
            raise _other(folder, f"its report is of the attack '{name}' with {known}, now {facts}")
    return results


def say_what_was_replaced(folder: str | Path, before: dict[str, dict], after: dict[str, dict]) -> None:
    """Logs which numbers of an earlier report are not in the new one, or are others.

    Args:
        folder (`str` or `Path`): Of both reports.
        before (`dict[str, dict]`): Metric or attack -> model -> numbers, of the earlier report.
        after (`dict[str, dict]`): The same of the new one.
    """
    replaced = [
        name
        for name, models in before.items()
        if any(after.get(name, {}).get(model) != numbers for model, numbers in models.items())
    ]
    if replaced:
        logger.warning(
            "output_dir %s: replaced its earlier report, whose numbers of %s were others; images and scores stay",
            folder,
            ", ".join(replaced),
        )


def prompts_digest(rows: Sequence[PromptRow]) -> str:
    """A hash of ids, prompts and seeds."""
    drawn = json.dumps([[row.id, row.prompt, row.seed] for row in rows], ensure_ascii=False)
    return hashlib.sha256(drawn.encode()).hexdigest()


def _results(folder: Path, attacks: bool) -> dict:
    path = folder / RESULTS_NAME
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        results = None
    if not _is_report(results):
        raise _other(folder, f"its {RESULTS_NAME} is not of an evaluation or of attacks")
    if ("attacks" in results) != attacks:
        raise _other(folder, f"it holds the report of {'attacks' if 'attacks' in results else 'an evaluation'}")
    return results


def holds_report(folder: Path) -> bool:
    """Whether the results of a comparison are in a folder."""
    path = folder / RESULTS_NAME
    try:
        return path.is_file() and _is_report(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False


def _is_report(results: object) -> bool:
    """Whether a JSON value has the parts of a report that are read here."""

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
