"""Compares models on the same prompts and seeds: images, metrics, differences to the original, a report.

    subjects = [LoadedModel("original", pipeline), LoadedModel("erased", erased)]  # or ImageFolder("theirs", "pngs")
    evaluate(subjects, rows, [PixelDistance()], "runs/evaluation")

The first model is the one that the others are compared with. Images lie in `images/{name}/` below the folder, raw
scores beside them: a run that was stopped goes on, and one with another threshold neither generates nor scores.
"""

import gc
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline

from ..arguments import choose, typed
from ..embedded import embedded_name
from ..generation.folders import ImageFolder, common_settings
from ..generation.generate import GenerationSettings, PromptRow, check_rows, different_images, generate
from ..generation.processes import launched_processes
from ..metrics.base import Metric
from ..output_folders import claimed, prepare_files
from ..provenance import library_versions, write_text
from ..report.elements import PAGE_NAME, RESULTS_NAME
from ..report.page import write_report
from .measured import Measured, measure, metric_results
from .pictures import BLUR_CHOICES, PICTURES, shown_flags
from .summary import evaluation_report, results_table
from .used_folder import IMAGES, check_used_folder, holds_report, prompts_digest, say_what_was_replaced


MODEL_FACTS, TABLE_NAME = "model.json", "results.md"


class ModelSource(Protocol):
    """What generates images: a model with its ways of steering."""

    name: str

    def load(self, settings: GenerationSettings) -> tuple[DiffusionPipeline, GenerationSettings]:
        """The pipeline, and the settings with what the steering adds."""


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline in memory.

    Attributes:
        name (`str`): What tables and folders call it.
        pipeline ([`~diffusers.DiffusionPipeline`]): Any that takes prompts.
        changes (`dict`): Settings of its own, such as `{"negative_prompt": "a weapon"}`.
    """

    name: str
    pipeline: DiffusionPipeline = field(repr=False)
    changes: dict = field(default_factory=dict)

    def load(self, settings: GenerationSettings) -> tuple[DiffusionPipeline, GenerationSettings]:
        return self.pipeline, replace(settings, **self.changes)


@typed
def evaluate(
    subjects: Sequence[ModelSource | ImageFolder],
    rows: Sequence[PromptRow],
    metrics: Sequence[Metric],
    folder: str | Path,
    settings: GenerationSettings | None = None,
    batch_size: int = 16,
    scoring_batch_size: int = 16,
    title: str = "",
    prompts: dict | None = None,
    images_only: bool = False,
    blur: str = "flagged",
    pictures: int = PICTURES,
    overwrite: bool = False,
) -> dict:
    """Generates the same rows with each model, measures them, and writes `results.json`, `results.md` and
    `report.html`.

    Safety checkers are off while generating, because images that they blacken would count as safe. Differences to the
    first model are taken image by image, on the same prompts and seeds. Several processes share the generating; the
    first of them measures.

    Args:
        subjects (`Sequence`): Models, each with a `name` and a `load(settings)` as [`LoadedModel`], or
            [`ImageFolder`]s; the first is the original.
        rows (`Sequence[PromptRow]`): At least one, with different ids.
        metrics (`Sequence[Metric]`): At least one.
        folder (`str` or `Path`): Where everything goes. What an earlier run left there must be of the same models,
            prompts and settings; more models, rows or metrics may come.
        settings (`GenerationSettings`, *optional*): How to sample.
        batch_size (`int`, defaults to 16): Images generated at once.
        scoring_batch_size (`int`, defaults to 16): Images scored at once.
        title (`str`, *optional*): Of the page.
        prompts (`dict`, *optional*): Where the rows come from, for the protocol.
        images_only (`bool`, defaults to `False`): Load no model: take the images that an earlier run left in `folder`.
        blur (`str`, defaults to `"flagged"`): Which pictures of the page are blurred until clicked: those that a
            metric of the concept flagged, `"all"` or `"none"`.
        pictures (`int`, defaults to 24): Of each model on the page; of what was to go and of what was to stay so many
            each, where metrics tell them apart.
        overwrite (`bool`, defaults to `False`): Replace the images and the report of other prompts, models or settings
            that `folder` holds.

    Returns:
        `dict`: What `results.json` holds: `protocol`; `models`, name -> facts; `metrics`, name -> `identity`,
        `quantities`, and for each model `estimates`, `differences`, `by_prompt` (shares of images, of at most 100
        prompts), `details` and `sweeps`; `report`, how many pictures are on the page and how many of them flagged;
        `headline`, what tables show; `warnings`, what spoils the numbers, a sentence each. Empty in all processes but
        the first.

    Raises:
        `ValueError`: If there is no image to measure, names are no names or occur twice, a metric compares and there
            is one model, no metric says anything of these images, images or an earlier report in `folder` are of other
            models, prompts or settings, or a file is broken. What was generated and scored until then is kept.
    """
    folder, settings = Path(folder), settings or GenerationSettings()
    blur = choose("blur", blur, BLUR_CHOICES)
    if images_only:
        subjects = [as_images(subject, folder) for subject in subjects]
    earlier = check_evaluation(subjects, rows, metrics, folder, settings, overwrite)
    with claimed(folder, **report_claim("evaluation", overwrite)):
        launched_processes().wait_for_everyone()  # before one writes what another checks
        # All that is there is looked at before anything is generated.
        found = {subject.name: _found(subject, rows) for subject in subjects if isinstance(subject, ImageFolder)}
        _check_images_of_report(found, rows, earlier)
        models = [
            found.get(subject.name) or _generated(subject, rows, folder, settings, batch_size, overwrite)
            for subject in subjects
        ]
        if not launched_processes().is_main_process:
            return {}
        measured = [measure(metric, models, scoring_batch_size) for metric in metrics]
        results = {
            "protocol": _protocol(models, rows, settings, prompts or {}),
            "models": {
                model.name: {**model.facts, "images": len(model.rows), "sha256": model.digest, "black": model.black}
                for model in models
            },
            "metrics": {facts.name: metric_results(facts, models) for facts in measured},
        }
        if not any(facts.whole(models) for facts in measured):
            names = ", ".join(facts.name for facts in measured)
            raise ValueError(f"metrics {names}: give no number for any of these {len(rows)} images")
        report = evaluation_report(results, models, measured, title, blur, pictures)
        prepare_files(folder, RESULTS_NAME, PAGE_NAME, TABLE_NAME)
        path = write_report(folder, {**results, "report": shown_flags(report)}, report)
        results = json.loads(path.with_name(RESULTS_NAME).read_text(encoding="utf-8"))
        write_text(folder / TABLE_NAME, results_table(results, report.title))
        say_what_was_replaced(folder, _numbers(earlier), _numbers(results))
        return results


def report_claim(kind: str, overwrite: bool) -> dict:
    """How a comparison claims its folder, see [`claimed`]; what is in it [`check_used_folder`] compares."""
    return {
        "kind": kind,
        "continues": (RESULTS_NAME, PAGE_NAME, TABLE_NAME),
        "overwrite": overwrite,
        "is_own": holds_report,
    }


def check_evaluation(
    subjects: Sequence[ModelSource | ImageFolder],
    rows: Sequence[PromptRow],
    metrics: Sequence[Metric],
    folder: str | Path,
    settings: GenerationSettings,
    overwrite: bool = False,
) -> dict:
    """What can be known before any work; the results of an earlier run in the folder, if they are not replaced.

    Raises:
        `ValueError`: As [`evaluate`].
    """
    check_subjects(subjects)
    check_rows(list(rows))
    _check_metrics(metrics, rows, subjects)
    return {} if overwrite else check_subjects_of_folder(subjects, rows, folder, settings)


def check_subjects_of_folder(
    subjects: Sequence[ModelSource | ImageFolder],
    rows: Sequence[PromptRow],
    folder: str | Path,
    settings: GenerationSettings,
    **of_attacks,
) -> dict:
    """[`check_used_folder`] for models as they are asked for."""
    asked, sampled = {}, {}
    for subject in subjects:
        if not isinstance(subject, ImageFolder):
            sampled[subject.name] = replace(settings, **getattr(subject, "changes", {}))
            asked[subject.name] = _steering(subject)
        elif Path(subject.folder) == Path(folder) / IMAGES / subject.name:
            asked[subject.name] = {}
        else:
            asked[subject.name] = {"images_of": without_folder(str(subject.folder))}
    return check_used_folder(folder, asked, rows, sampled, **of_attacks)


def _numbers(results: dict) -> dict[str, dict]:
    return {name: metric["estimates"] for name, metric in results.get("metrics", {}).items()}


def check_subjects(subjects: Sequence[ModelSource | ImageFolder]) -> None:
    """
    Raises:
        `ValueError`: If there is none, or a name is no folder's name or occurs twice.
    """
    if not subjects:
        raise ValueError("models: there must be at least one")
    names = [subject.name for subject in subjects]
    for place, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._ ,'+-]*", name):
            raise ValueError(f"model name '{name}': allowed are letters, digits, blanks and . _ , ' + -")
        if len(name) > 100:
            raise ValueError(f"model name '{name[:60]}...': may have 100 characters, as the name of a folder")
        if name.lower() in [other.lower() for other in names[:place]]:
            raise ValueError(f"model name '{name}': given twice; write name=MODEL, with another name for each")


def as_images(subject: ModelSource | ImageFolder, folder: Path) -> ImageFolder:
    """The images that an earlier run left of a model."""
    return subject if isinstance(subject, ImageFolder) else ImageFolder(subject.name, folder / IMAGES / subject.name)


def _check_metrics(
    metrics: Sequence[Metric], rows: Sequence[PromptRow], subjects: Sequence[ModelSource | ImageFolder]
) -> None:
    if not metrics:
        raise ValueError("metrics: there must be at least one")
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"metric '{name}': given twice")
    for metric in metrics:
        if metric.compares and len(subjects) < 2:
            raise ValueError(
                f"metric '{metric.name}': compares models with the first one, and {subjects[0].name} is the only one; "
                "give another model, or leave the metric out"
            )
        metric.check([asdict(row) for row in rows])


# --- images ----------------------------------------------------------------------------------------------------------


def _found(subject: ImageFolder, rows: Sequence[PromptRow]) -> Measured:
    """Images that are there already."""
    found = subject.find(rows)
    facts = {
        "images_of": without_folder(str(subject.folder)),
        "fingerprint": found[0].get("model"),
        **_known_facts(subject.folder),
        "settings": common_settings(found),
    }
    return Measured(subject.name, Path(subject.folder), found, facts)


def _check_images_of_report(found: dict[str, Measured], rows: Sequence[PromptRow], earlier: dict) -> None:
    """Whether the images at hand are those of the earlier report, where that is of the same prompts."""
    for name, model in found.items():
        known = earlier.get("models", {}).get(name, {}).get("sha256", model.digest)
        if known != model.digest and earlier["protocol"]["prompts"]["sha256"] == prompts_digest(rows):
            raise ValueError(f"{name}: the report in output_dir is of other images; give another folder")


def _generated(
    subject: ModelSource,
    rows: Sequence[PromptRow],
    folder: Path,
    settings: GenerationSettings,
    batch_size: int,
    overwrite: bool,
) -> Measured:
    place = folder / IMAGES / subject.name
    pipeline, own_settings = subject.load(settings)
    manifest = generate(
        pipeline, list(rows), place, own_settings, batch_size, f"images of {subject.name}", overwrite=overwrite
    )
    facts = model_facts(subject, pipeline, manifest[0]["model"])
    del pipeline  # before the next one is loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if launched_processes().is_main_process:
        write_text(place / MODEL_FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return Measured(subject.name, place, manifest, {**facts, "settings": common_settings(manifest)})


def _steering(subject: ModelSource) -> dict:
    """What a subject's fields say beyond their defaults, as far as it fits into JSON."""
    told = {}
    for item in fields(subject) if is_dataclass(subject) else ():
        value = getattr(subject, item.name)
        if item.name != "name" and value != item.default and isinstance(value, (str, int, float, list)) and value:
            told[item.name] = without_folder(value) if isinstance(value, str) else value
    return told


def without_folder(text: str) -> str:
    """A path that is there by its name alone: results are published, and where things lie is nobody's business."""
    try:
        path = Path(text)
        return embedded_name(path) or path.resolve().name if path.exists() else text
    except (OSError, ValueError):  # too long for a path, or not one
        return text


def model_facts(subject: ModelSource, pipeline: DiffusionPipeline, fingerprint: str) -> dict:
    """What is known of a model: how it was asked for, what was loaded, and its fingerprint in a manifest."""
    return {
        **_steering(subject),
        "pipeline": type(pipeline).__name__,
        "fingerprint": fingerprint,
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
    }


def _known_facts(folder: Path) -> dict:
    path = Path(folder) / MODEL_FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _protocol(
    models: list[Measured],
    rows: Sequence[PromptRow],
    settings: GenerationSettings,
    prompts: dict,
) -> dict:
    return {
        "prompts": {
            **prompts,
            "different": len({row.prompt for row in rows}),
            "images": len(rows),
            **({"repeated": repeated} if (repeated := len(rows) - different_images(rows)) else {}),
            "seeds": [min(row.seed for row in rows), max(row.seed for row in rows)],
            "sha256": prompts_digest(rows),
        },
        "settings": models[0].facts["settings"] or asdict(settings),
        "original": models[0].name,
        "safety_checker": _safety_checkers(models),
        "black_images": {model.name: model.black for model in models},
        "versions": library_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _safety_checkers(models: list[Measured]) -> str:
    """Whether safety checkers were on, by model where any may have been."""
    states = {
        model.name: model.facts["settings"]["safety_checker"] if model.facts["settings"] else "unknown"
        for model in models
    }
    if set(states.values()) == {"off"}:
        return "off"
    return ", ".join(f"{state} for {name}" for name, state in states.items())
