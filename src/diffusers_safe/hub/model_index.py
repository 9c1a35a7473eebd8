"""The numbers of an evaluation in the Hub's formats: `model-index` in a card, `.eval_results/` next to the model.

The first takes any number. The second is for datasets that are registered as benchmarks on the Hub, whose tasks have
ids.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..output_folders import check_own_file, record_written
from ..provenance import write_text
from ..report.results import headline_table
from .contents import BENCHMARKS, evaluation_files, find_results, read_results


def check_evaluation(folder: str | Path) -> None:
    """
    Raises:
        `ValueError`: If the evaluation in a folder cannot be shown on its card.
    """
    if (path := find_results(folder)) is None:
        return
    results = read_results(path)
    try:
        eval_results(Path(folder))
        evaluation_files(Path(folder))
        if "headline" in results:
            headline_table(results)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not the results of an evaluation ({type(error).__name__}: {error}); evaluate again, or remove it"
        ) from None


def model_index(folder: Path, repo_id: str) -> dict[str, Any]:
    """Arguments of `ModelCardData` with the numbers of the evaluation in a folder; empty without one."""
    numbers = eval_results(folder)
    return {"model_name": repo_id.split("/")[-1], "eval_results": numbers} if numbers else {}


def eval_results(folder: Path) -> list[EvalResult]:
    """The numbers of the model in a folder, with interval, N and protocol."""
    path = find_results(folder)
    results = read_results(path) if path else {}
    prompts = results.get("protocol", {}).get("prompts")
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=prompts.get("source", "custom"),
            dataset_name=prompts.get("source", "custom prompts"),
            dataset_args={"prompts": prompts["different"], "images": prompts["images"], "sha256": prompts["sha256"]},
            metric_type=f"{metric}/{name}" if name != metric else name,
            metric_name=quantity["label"],
            metric_value=estimate["value"],
            metric_args={"low": estimate["low"], "high": estimate["high"], "confidence": 0.95, "n": estimate["n"]},
        )
        for metric, name, quantity, estimate in _numbers(results, folder)
    ]


def write_benchmark(
    folder: str | Path,
    dataset_id: str,
    tasks: dict[str, str],
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes numbers of the model in a folder to `.eval_results/{dataset}.yaml`, which the Hub shows on the model's
    page and in the benchmark's table.

    Args:
        folder (`str` or `Path`): A result with an evaluation.
        dataset_id (`str`): Id of a dataset that is a benchmark on the Hub.
        tasks (`dict[str, str]`): Quantity -> id of the benchmark's task.
        revision (`str`, *optional*): Revision of the dataset.
        overwrite (`bool`, defaults to `False`): Move an existing file that this package did not write to
            `.replaced-1`.

    Raises:
        `ValueError`: If the id is invalid, there is no evaluation with these numbers, or the file exists and was not
            written by this package.
    """
    folder = Path(folder)
    try:
        validate_repo_id(dataset_id)
    except HFValidationError:
        raise ValueError(f"benchmark '{dataset_id}': not the id of a dataset; give user/name") from None
    path = find_results(folder)
    results = read_results(path) if path else {}
    numbers = {name: (quantity, estimate) for _, name, quantity, estimate in _numbers(results, folder)}
    entries = []
    for name, task_id in tasks.items():
        if name not in numbers:
            raise ValueError(f"benchmark {dataset_id}: the evaluation of {folder} has no {name}; "
                             f"it has {', '.join(numbers) or 'none of this model'}")  # fmt: skip
        quantity, estimate = numbers[name]
        scale = 100 if quantity["unit"] == "%" else 1
        entries.append(
            EvalResultEntry(
                dataset_id=dataset_id,
                task_id=task_id,
                value=round(scale * estimate["value"], 4),
                dataset_revision=revision,
                date=results["protocol"]["created"],
                notes=f"95 % interval {scale * estimate['low']:.4g} to {scale * estimate['high']:.4g}, "
                f"N={estimate['n']}; diffusers-safe",
            )
        )
    place = folder / BENCHMARKS / f"{dataset_id.replace('/', '--')}.yaml"
    check_own_file(folder, place, overwrite)
    write_text(place, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
    record_written(folder, place.relative_to(folder).as_posix())
    return place


def _numbers(results: dict, folder: Path) -> Iterator[tuple[str, str, dict, dict]]:
    """Yields metric, name of the quantity, quantity and estimate, for the model in a folder."""
    name = _own_name(results, folder)
    for metric, found in results.get("metrics", {}).items():
        for quantity, estimate in found["estimates"].get(name, {}).items():
            yield metric, quantity, found["quantities"][quantity], estimate


def _own_name(results: dict, folder: Path) -> str | None:
    """The name of the model in an evaluation: the one that was loaded from this folder, else the second of two."""
    models = results.get("models", {})
    own = [name for name, facts in models.items() if facts.get("model") == folder.resolve().name]
    if len(own) == 1:
        return own[0]
    return list(models)[1] if len(models) == 2 else None
