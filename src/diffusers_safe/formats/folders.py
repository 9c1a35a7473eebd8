"""Result folders: whole or absent, and with an index that every environment can load."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..evaluation.grid import GRID_NAME
from ..provenance import FILE_NAME, STUDENT_FILE, Distillation, Provenance, write_text
from .write import LORA_NAME, PARTIAL_NAME


INDEX = "model_index.json"
UNET_FOLDER = "unet"
# What makes a folder an erased model or a student; a new result replaces all of them.
RESULTS = (FILE_NAME, STUDENT_FILE, INDEX, PARTIAL_NAME, LORA_NAME, UNET_FOLDER, GRID_NAME)
# Index entries of older repositories and of environments without torchvision -> what every environment can load.
_RENAMED = {
    ("stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"): (
        "stable_diffusion",
        "StableDiffusionSafetyChecker",
    ),
    ("transformers", "CLIPImageProcessorPil"): ("transformers", "CLIPImageProcessor"),
}


@contextmanager
def written_aside(folder: str | Path, record: Provenance | Distillation | None = None) -> Iterator[Path]:
    """A folder to write a result to, with its record, if it has one. When the block has ended well, all of it moves
    into `folder`.

    What an earlier result left there ([`RESULTS`]) goes first, and JSON files come last: a folder that has a
    `model_index.json` or a record is complete. When the block fails, `folder` is as it was, or not there.
    """
    folder = Path(folder)
    aside = folder / ".result.partial"
    shutil.rmtree(aside, ignore_errors=True)
    made = [path for path in aside.parents if not path.exists()]
    aside.mkdir(parents=True)
    try:
        if record is not None:
            record.save(aside)
        yield aside
    except BaseException:
        shutil.rmtree(aside)
        for path in made:
            with suppress(OSError):  # somebody else has put something into it
                path.rmdir()
        raise
    for name in RESULTS:
        _remove(folder / name)
    for item in sorted(aside.iterdir(), key=lambda item: (item.suffix == ".json", item.name)):
        _remove(folder / item.name)
        os.replace(item, folder / item.name)
    aside.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_no_result(folder: str | Path) -> None:
    """Looks for a model in an output folder, which a new one would replace.

    Raises:
        `ValueError`: If there is one.
    """
    if found := [name for name in RESULTS if (Path(folder) / name).exists()]:
        raise ValueError(f"output_dir {folder}: holds a model already ({found[0]}); give another")


def save_model(pipeline: DiffusionPipeline, folder: str | Path, only_unet: bool = False) -> None:
    """Writes a pipeline as a stock folder that every environment can load, or its UNet alone; in safetensors."""
    if only_unet:
        pipeline.unet.save_pretrained(Path(folder) / UNET_FOLDER, safe_serialization=True)
    else:
        pipeline.save_pretrained(folder, safe_serialization=True)
        rewrite_index(folder, stock_class_name(pipeline))


def stock_class_name(pipeline: DiffusionPipeline) -> str:
    """The class of diffusers itself that a pipeline is of, or that its class extends."""
    return next(cls.__name__ for cls in type(pipeline).__mro__ if cls.__module__.startswith("diffusers."))


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
