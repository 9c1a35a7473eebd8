"""Which files of a result's folder are published.

Local paths are private, so published files name no local folder. The files on disk keep the path of their base model,
which they are loaded with.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..families import check_files, denoiser_names
from ..formats import (
    CHECKPOINT_NAME,
    INDEX,
    KOHYA_NAME,
    LORA_NAME,
    PARTIAL_NAME,
    copy_with_facts,
    model_folders,
)
from ..images import open_rgb
from ..model_errors import reason
from ..model_files import check_header, read_json_object
from ..provenance import FILE_NAME, STUDENT_FILE, Distillation, Provenance, load_record, write_text
from ..report.grid import GRID_NAME
from .base import Base
from .cards import CARD_NAME


BENCHMARKS = ".eval_results"  # folder in which the Hub looks for benchmark results
_RESULTS = ("results.json", "evaluation/results.json")
_REPORTS = ("report.html", "evaluation/report.html")
# What is published, besides the folders that model_index.json names and an evaluation.
_PUBLISHED = (CARD_NAME, FILE_NAME, STUDENT_FILE, INDEX, GRID_NAME, "*.safetensors", "LICENSE*")
# What is deleted from a repository if a new result does not have it, besides the folders of models.
_FILES = (PARTIAL_NAME, LORA_NAME, KOHYA_NAME, CHECKPOINT_NAME)
_REPLACED = (FILE_NAME, STUDENT_FILE, INDEX, GRID_NAME, *_FILES, *_RESULTS, *_REPORTS)
# Suffixes of the names of arguments that hold paths.
_PATHS = ("_dir", "_path", "_file", "_folder", "_checkpoint", "config", "from_student")


def check_folder(folder: str | Path) -> None:
    """
    Raises:
        `ValueError`: If the folder does not hold a finished erasure or student, or a file of it is damaged.
    """
    record = load_record(folder)
    if (Path(folder) / INDEX).is_file():
        check_files(folder, str(folder))
    weights = [name for name in result_files(Path(folder)) if fnmatch(name, "*.safetensors")]
    if not weights:
        raise ValueError(f"{folder}: holds {record.file_name}, but neither a pipeline nor erased weights")
    for name in weights:
        if "/" not in name:  # erased weights, a LoRA
            check_header(Path(folder) / name)
    if (picture := Path(folder) / GRID_NAME).is_file():
        open_rgb(picture)


def result_files(folder: Path) -> list[str]:
    """The files of a result, as paths inside the folder, without hidden files."""
    found = [path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in _PUBLISHED)]
    for part in _parts(folder):
        found += (folder / part).rglob("*")
    found += evaluation_files(folder)
    names = [path.relative_to(folder) for path in found if path.is_file()]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return sorted(name.as_posix() for name in [*shown, *_benchmark_files(folder)])


def evaluation_files(folder: Path) -> list[Path]:
    """Results and report of the model in a folder; without the report if it shows flagged images, which are not
    published."""
    results = find_results(folder)
    if results is None:
        return []
    page = results.with_name("report.html")
    flagged = read_results(results).get("report", {}).get("flagged", 0)
    return [results, page] if page.is_file() and not flagged else [results]


def _benchmark_files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in (folder / BENCHMARKS).glob("*.yaml")]


def _parts(folder: Path) -> list[str]:
    """The folders of a pipeline's models, or that of the denoiser where it was saved alone."""
    index = folder / INDEX
    entries = read_json_object(index) if index.is_file() else dict.fromkeys(denoiser_names(), [])
    plain = [name for name, value in entries.items() if isinstance(value, list) and Path(name).name == name]
    return [name for name in plain if any((folder / name).glob("*.json"))]


def is_replaced(path: str) -> bool:
    """Whether a file of a repository is part of the result, which a new result replaces."""
    return path in _REPLACED or path.split("/")[0] in model_folders()


def published_record(record: Provenance | Distillation, base: Base) -> Provenance | Distillation:
    """A record as it is published: with the id of the base model on the Hub or the name of its folder, and without
    arguments that are paths."""
    arguments = _without_paths(record.arguments)
    if isinstance(record, Provenance):
        return replace(record, base_model=base.name, arguments=arguments)
    erasure = record.teacher_erasure
    if erasure is not None:
        base_model = _without_folder(str(erasure.get("base_model")))
        erasure = {**erasure, "base_model": base_model, "arguments": _without_paths(erasure.get("arguments", {}))}
    # Names and reasons contain paths of images; their number does not.
    data = {**record.data, "unreadable": len(record.data.get("unreadable", {}))}
    student = _without_folder(record.student)
    return replace(record, teacher=base.name, student=student, arguments=arguments, teacher_erasure=erasure, data=data)


def _without_paths(arguments: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in arguments.items() if not name.endswith(_PATHS)}
    if dataset := kept.get("dataset_name"):
        kept["dataset_name"] = _without_folder(dataset)
    return kept


def _without_folder(name: str) -> str:
    """A Hub id unchanged; the name of a folder, which need not exist anymore."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return Path(name).name
    return Path(name).name if Path(name).exists() else name


@contextmanager
def as_published(
    folder: Path, names: list[str], record: Provenance | Distillation | None
) -> Iterator[dict[str, Path]]:
    """The files of a folder as they are published: name -> path. Files that contain local paths are replaced by
    temporary copies without them: `erasure.json` and the facts in files of weights are those of the record, and
    configs do not say where they were loaded from.

    Args:
        folder (`Path`): A result.
        names (`list[str]`): Paths inside the folder.
        record (`Provenance` or `Distillation`, *optional*): From [`published_record`].
    """
    with tempfile.TemporaryDirectory() as copies:
        files = {}
        for name in names:
            copy = Path(copies, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            files[name] = copy if _copied_without_paths(folder, name, copy, record) else folder / name
        yield files


def _copied_without_paths(folder: Path, name: str, copy: Path, record: Provenance | Distillation | None) -> bool:
    """Writes a copy without local paths; returns whether there were any."""
    if record is not None and name == record.file_name:
        record.save(copy.parent)
        return True
    if isinstance(record, Provenance) and name.endswith(".safetensors") and "/" not in name:
        return copy_with_facts(folder / name, copy, record)
    if name != INDEX and not name.endswith("config.json"):
        return False
    config = read_json_object(folder / name)
    if "_name_or_path" not in config:
        return False
    del config["_name_or_path"]
    write_text(copy, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return True


def find_results(folder: str | Path) -> Path | None:
    """The evaluation of the model in a folder: `results.json` there or in `evaluation/`. One that is older than the
    model is of another model and ignored."""
    record = load_record(folder)
    for name in _RESULTS:
        if (path := Path(folder) / name).is_file():
            created = read_results(path).get("protocol", {}).get("created")
            if created is None or str(created) >= record.created:
                return path
    return None


def read_results(path: Path) -> dict[str, Any]:
    """
    Raises:
        `ValueError`: If the file does not hold the results of an evaluation.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as the results of an evaluation ({reason(error)})") from None
    if not isinstance(results, dict) or not all(
        isinstance(results.get(part, {}), dict) for part in ("protocol", "report")
    ):
        raise ValueError(f"{path}: not the results of an evaluation")
    return results
