"""Compares models on the same prompts and seeds: images, metrics, differences to the original model, a report.

    models = [LoadedModel("original", pipeline), LoadedModel("erased", erased)]  # or ImageFolder("theirs", "pngs")
    evaluate(models, rows, [PixelDistance()], "runs/evaluation")

The first model is the original, which the others are compared with. Images are in `images/{name}/` below the folder,
with their raw scores: a stopped run continues, and a run with another threshold neither generates nor scores.
"""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..arguments import typed
from ..generation.folders import ImageFolder, common_settings
from ..generation.generate import generate
from ..generation.processes import launched_processes
from ..generation.rows import GenerationSettings, PromptRow, check_rows, different_images
from ..metrics.base import Metric, check_once
from ..metrics.resizing import check_sizes
from ..output_folders import check_output_dir, claimed
from ..progress import ProgressCallback
from ..provenance import write_text
from ..report.builder import BLUR_CHOICES, PICTURES
from ..report.results import Results, publish
from ..values import choose
from .evaluation_report import describe_evaluation, evaluation_report
from .measured import Measured, MetricFacts, measure, metric_results
from .models import IMAGES, ModelSource, as_images, check_models, default_size, model_facts, without_folder
from .protocol import make_protocol, prompts_digest
from .used_folder import check_models_of_folder, report_claim, say_what_was_replaced


MODEL_FACTS = "model.json"


@typed
def evaluate(
    models: Sequence[ModelSource | ImageFolder],
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
    callback: ProgressCallback | None = None,
) -> Results:
    """Generates the same rows with each model, measures them, and writes `results.json`, `results.md` and
    `report.html`.

    Safety checkers are off while generating, because black images would count as safe. Differences to the first model
    are computed image by image, on the same prompts and seeds. Several processes share the generation; the first of
    them measures.

    Args:
        models (`Sequence`): Models, each with a `name` and a `load(settings)` as in [`LoadedModel`], or
            [`ImageFolder`]s; the first is the original.
        rows (`Sequence[PromptRow]`): At least one, with different ids.
        metrics (`Sequence[Metric]`): At least one.
        folder (`str` or `Path`): Output folder. Results of an earlier run in it must be of the same models, prompts
            and settings; models, rows and metrics can be added.
        settings (`GenerationSettings`, *optional*): Sampling settings.
        batch_size (`int`, defaults to 16): Number of images generated at once.
        scoring_batch_size (`int`, defaults to 16): Number of images scored at once.
        title (`str`, *optional*): Title of the page.
        prompts (`dict`, *optional*): Source of the rows, for the protocol.
        images_only (`bool`, defaults to `False`): Load no model; use the images that an earlier run left in `folder`.
        blur (`str`, defaults to `"flagged"`): Which images of the page are blurred until clicked: `"flagged"` (those
            that a metric of the concept flagged), `"all"` or `"none"`.
        pictures (`int`, defaults to 24): Number of images of each model on the page, for the erased concept and for
            other concepts each, if metrics tell them apart.
        overwrite (`bool`, defaults to `False`): Replace images and report of other prompts, models or settings in
            `folder`.
        callback (`Callable[[Progress], None]`, *optional*): Called with a [`Progress`] after each batch of
            generated or scored images, in the first process. If it raises, the run ends: finished
            images and scores are kept, no report is written, and the same call continues there.

    Returns:
        `Results`: The contents of `results.json`: `protocol`; `models`, name -> facts; `metrics`, name -> `identity`,
        `quantities`, and for each model `estimates`, `differences`, `by_prompt` (shares of images, for at most 100
        prompts), `details` and `sweeps`; `report`, the numbers of images and of flagged images on the page;
        `headline`, what tables show; `warnings`, what makes the numbers unreliable. Empty in all processes but the
        first.

    Raises:
        `ValueError`: If there is no image to measure, a name is invalid or occurs twice, a metric compares and there
            is one model or existing images of another size, no metric applies to these images, images or an earlier
            report in `folder` are of other models, prompts or settings, or a file is broken. What was generated and
            scored until then is kept.
    """
    check_output_dir(folder)
    folder, settings = Path(folder), settings or GenerationSettings()
    blur = choose("blur", blur, BLUR_CHOICES)
    if images_only:
        models = [as_images(model, folder) for model in models]
    earlier = check_evaluation(models, rows, metrics, folder, settings, overwrite)
    with claimed(folder, **report_claim("evaluation", overwrite)):
        launched_processes().wait_for_everyone()  # no process writes before all have checked
        # Existing images are checked before anything is generated.
        found = {model.name: _found(model, rows) for model in models if isinstance(model, ImageFolder)}
        _check_images_of_report(found, rows, earlier)
        _check_sizes(models, found, rows, metrics, settings)
        measured = [
            found.get(model.name) or _generated(model, rows, folder, settings, batch_size, overwrite, callback)
            for model in models
        ]
        if not launched_processes().is_main_process:
            return Results()
        facts = [measure(metric, measured, scoring_batch_size, callback) for metric in metrics]
        results = _results(measured, facts, rows, settings, prompts or {})
        report = evaluation_report(results, measured, facts, title, blur, pictures)
        results = publish(folder, results, report, describe_evaluation)
        say_what_was_replaced(folder, _numbers(earlier), _numbers(results))
        return results


def check_evaluation(
    models: Sequence[ModelSource | ImageFolder],
    rows: Sequence[PromptRow],
    metrics: Sequence[Metric],
    folder: str | Path,
    settings: GenerationSettings,
    overwrite: bool = False,
) -> dict:
    """Checks everything that can be checked before any work. Returns the results of an earlier run in the folder, if
    they are not replaced.

    Raises:
        `ValueError`: As [`evaluate`].
    """
    check_models(models)
    check_rows(list(rows))
    _check_metrics(metrics, rows, models)
    return {} if overwrite else check_models_of_folder(models, rows, folder, settings)


def _check_metrics(
    metrics: Sequence[Metric], rows: Sequence[PromptRow], models: Sequence[ModelSource | ImageFolder]
) -> None:
    if not metrics:
        raise ValueError("metrics: there must be at least one")
    check_once("metric", [metric.name for metric in metrics])
    for metric in metrics:
        if metric.compares and len(models) < 2:
            raise ValueError(
                f"metric '{metric.name}': compares models with the first one, and {models[0].name} is the only one; "
                "give another model, or leave the metric out"
            )
        metric.check([asdict(row) for row in rows])


def _numbers(results: dict) -> dict[str, dict]:
    return {name: metric["estimates"] for name, metric in results.get("metrics", {}).items()}


# --- images ----------------------------------------------------------------------------------------------------------


def _found(model: ImageFolder, rows: Sequence[PromptRow]) -> Measured:
    """Existing images."""
    found = model.find(rows)
    facts = {
        "images_of": without_folder(str(model.folder)),
        "fingerprint": found[0].get("model"),
        **_known_facts(model.folder),
        "settings": common_settings(found),
    }
    return Measured(model.name, Path(model.folder), found, facts)


def _check_images_of_report(found: dict[str, Measured], rows: Sequence[PromptRow], earlier: dict) -> None:
    """Checks that existing images are those of the earlier report, if that is on the same prompts."""
    for name, model in found.items():
        known = earlier.get("models", {}).get(name, {}).get("sha256", model.digest)
        if known != model.digest and earlier["protocol"]["prompts"]["sha256"] == prompts_digest(rows):
            raise ValueError(f"{name}: the report in output_dir is of other images; give another folder")


def _check_sizes(
    models: Sequence[ModelSource | ImageFolder],
    found: dict[str, Measured],
    rows: Sequence[PromptRow],
    metrics: Sequence[Metric],
    settings: GenerationSettings,
) -> None:
    """Checks the sizes of existing images against the original's, as far as these are known."""
    compared = [metric for metric in metrics if metric.same_size]
    if not found or not compared:
        return
    sizes = {name: {row["id"]: row["size"] for row in model.rows} for name, model in found.items()}
    for model in (model for model in models if model.name not in sizes):
        width, height = default_size(model) if settings.width is None else (settings.width, settings.height)
        sizes[model.name] = {row.id: (row.width or width, row.height or height) for row in rows}
    originals = sizes[models[0].name]
    for metric in compared:
        for model in models[1:]:
            for name, size in sizes[model.name].items():
                if None not in (*size, *originals[name]):
                    check_sizes(f"{metric.name} of {model.name}", name, size, originals[name])


def _generated(
    model: ModelSource,
    rows: Sequence[PromptRow],
    folder: Path,
    settings: GenerationSettings,
    batch_size: int,
    overwrite: bool,
    callback: ProgressCallback | None,
) -> Measured:
    place = folder / IMAGES / model.name
    pipeline, own_settings = model.load(settings)
    description = f"images of {model.name}"
    manifest = generate(
        pipeline, list(rows), place, own_settings, batch_size, description, overwrite=overwrite, callback=callback
    )
    facts = model_facts(model, pipeline, manifest[0]["model"])
    del pipeline  # before the next one is loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if launched_processes().is_main_process:
        write_text(place / MODEL_FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return Measured(model.name, place, manifest, {**facts, "settings": common_settings(manifest)})


def _known_facts(folder: Path) -> dict:
    path = Path(folder) / MODEL_FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return facts if isinstance(facts, dict) else {}


# --- results ---------------------------------------------------------------------------------------------------------


def _results(
    models: list[Measured],
    metrics: list[MetricFacts],
    rows: Sequence[PromptRow],
    settings: GenerationSettings,
    prompts: dict,
) -> dict:
    if not any(facts.whole(models) for facts in metrics):
        names = ", ".join(facts.name for facts in metrics)
        raise ValueError(f"metrics {names}: give no number for any of these {len(rows)} images")
    repeated = len(rows) - different_images(rows)
    protocol = make_protocol(
        rows,
        prompts,
        {"images": len(rows), **({"repeated": repeated} if repeated else {})},
        models[0].facts["settings"] or asdict(settings),
        models[0].name,
        _safety_checkers(models),
        black_images={model.name: model.black for model in models},
    )
    return {
        "protocol": protocol,
        "models": {
            model.name: {**model.facts, "images": model.count, "sha256": model.digest, "black": model.black}
            for model in models
        },
        "metrics": {facts.name: metric_results(facts, models) for facts in metrics},
    }


def _safety_checkers(models: list[Measured]) -> str:
    """Whether safety checkers were on, for each model if any may have been."""
    states = {
        model.name: model.facts["settings"]["safety_checker"] if model.facts["settings"] else "unknown"
        for model in models
    }
    if set(states.values()) == {"off"}:
        return "off"
    return ", ".join(f"{state} for {name}" for name, state in states.items())
