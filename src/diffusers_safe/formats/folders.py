"""Result folders: whole or absent, and with an index that every environment can load."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..families import families, family_of_pipeline, own_pipelines
from ..files import disk_errors
from ..output_folders import put_in_place, remove_leftover
from ..provenance import FILE_NAME, STUDENT_FILE, Distillation, Provenance, write_text
from ..report.grid import GRID_NAME
from .write import CHECKPOINT_NAME, KOHYA_NAME, LORA_NAME, PARTIAL_NAME


INDEX = "model_index.json"
# Index entries of older repositories and of environments without torchvision -> what every environment can load.
_RENAMED = {
    ("stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"): (
        "stable_diffusion",
        "StableDiffusionSafetyChecker",
    ),
    ("transformers", "CLIPImageProcessorPil"): ("transformers", "CLIPImageProcessor"),
}


def model_folders() -> set[str]:
    """The folders of a pipeline's components, in all families."""
    return set().union(*(family.component_names() for family in families()))


def result_names() -> tuple[str, ...]:
    """What makes a folder an erased model or a student; a new result replaces all of them."""
    files = (PARTIAL_NAME, LORA_NAME, KOHYA_NAME, CHECKPOINT_NAME)
    return (FILE_NAME, STUDENT_FILE, INDEX, *files, *sorted(model_folders()), GRID_NAME)


@contextmanager
def written_aside(folder: str | Path, record: Provenance | Distillation | None = None) -> Iterator[Path]:
    """A folder to write a result to, with its record, if it has one. When the block has ended well, all of it moves
    into `folder`, see [`put_in_place`]; what an earlier result left there ([`result_names`]) makes way.

    When the block fails, `folder` is as it was, or not there.
    """
    folder = Path(folder)
    aside = folder / ".result.partial"
    remove_leftover(folder, aside.name)
    made = [path for path in aside.parents if not path.exists()]
    aside.mkdir(parents=True)
    try:
        with disk_errors(folder):
            if record is not None:
                record.save(aside)
            yield aside
    except BaseException:
        shutil.rmtree(aside)
        for path in made:
            with suppress(OSError):  # something else was put into it
                path.rmdir()
        raise
    put_in_place(aside, folder, result_names())


def save_model(pipeline: DiffusionPipeline, folder: str | Path, only_denoiser: bool = False) -> None:
    """Writes a pipeline as a stock folder that every environment can load, or its denoiser alone; in safetensors."""
    if only_denoiser:
        name = family_of_pipeline(pipeline).denoiser_name
        getattr(pipeline, name).save_pretrained(Path(folder) / name, safe_serialization=True)
    else:
        pipeline.save_pretrained(folder, safe_serialization=True)
        rewrite_index(folder, stock_class_name(pipeline))


def stock_class_name(pipeline: DiffusionPipeline) -> str:
    """The class of diffusers, or of a family, that a pipeline is of or that its class extends."""
    return stock_class(type(pipeline)).__name__


def stock_class(kind: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """As [`stock_class_name`], of a class."""
    known = own_pipelines().values()
    return next(base for base in kind.__mro__ if base in known or base.__module__.startswith("diffusers."))


def rewrite_index(folder: str | Path, class_name: str | list[str]) -> None:
    """Gives a saved pipeline's index its class name, and takes out what only this environment or machine knows."""
    path = Path(folder) / INDEX
    index = {key: rename_entry(entry) for key, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    index.pop("_name_or_path", None)  # a path of this machine
    write_text(path, json.dumps({**index, "_class_name": class_name}, indent=2, sort_keys=True) + "\n")


def rename_entry(entry: Any) -> Any:
    """One entry of an index, as every environment can load it."""
    key = tuple(entry) if isinstance(entry, (list, tuple)) and len(entry) == 2 else None
    return list(_RENAMED[key]) if key in _RENAMED else entry
