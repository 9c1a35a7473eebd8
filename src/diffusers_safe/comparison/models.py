"""The models that are compared: pipelines in memory, models that are loaded when needed, and folders of images."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Protocol

from diffusers import DiffusionPipeline

from ..embedded import embedded_name
from ..families import StoredModel, make_family
from ..generation.folders import ImageFolder
from ..generation.rows import GenerationSettings


IMAGES = "images"  # the folder with the images of all models, in an output folder


class ModelSource(Protocol):
    """What generates images: a model and the way it is steered."""

    name: str

    def load(self, settings: GenerationSettings) -> tuple[DiffusionPipeline, GenerationSettings]:
        """The pipeline, and the settings with what the steering adds."""


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline in memory.

    Attributes:
        name (`str`): Name of the model in tables and folders.
        pipeline ([`~diffusers.DiffusionPipeline`]): Any pipeline that takes prompts.
        changes (`dict`): Settings for this model alone, such as `{"negative_prompt": "a weapon"}`.
    """

    name: str
    pipeline: DiffusionPipeline = field(repr=False)
    changes: dict = field(default_factory=dict)

    def load(self, settings: GenerationSettings) -> tuple[DiffusionPipeline, GenerationSettings]:
        return self.pipeline, replace(settings, **self.changes)


def default_size(model: ModelSource) -> tuple[int | None, int | None]:
    """Width and height of a model's images if none are asked for, as far as its configs tell."""
    try:
        if isinstance(model, LoadedModel):
            side = make_family(model.pipeline).picture_size
            return side, side
        if isinstance(name := getattr(model, "model", None), str):
            return StoredModel(name, revision=getattr(model, "revision", None)).image_size
    except ValueError:  # of no supported family, or a single file
        pass
    return None, None


def check_models(models: Sequence[ModelSource | ImageFolder]) -> None:
    """
    Raises:
        `ValueError`: If there is no model, or a name cannot be the name of a folder or occurs twice.
    """
    if not models:
        raise ValueError("models: there must be at least one")
    names = [model.name for model in models]
    for place, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._ ,'+-]*", name):
            raise ValueError(f"model name '{name}': allowed are letters, digits, blanks and . _ , ' + -")
        if len(name) > 100:
            raise ValueError(f"model name '{name[:60]}...': may have at most 100 characters")
        if name.lower() in [other.lower() for other in names[:place]]:
            raise ValueError(f"model name '{name}': given twice; write name=MODEL, with another name for each")


def as_images(model: ModelSource | ImageFolder, folder: Path) -> ImageFolder:
    """The images of a model that an earlier run wrote to `folder`."""
    return model if isinstance(model, ImageFolder) else ImageFolder(model.name, folder / IMAGES / model.name)


def options_of(model: ModelSource) -> dict:
    """The fields of a model source that differ from their defaults and can be written as JSON."""
    options = {}
    for item in fields(model) if is_dataclass(model) else ():
        value = getattr(model, item.name)
        if item.name != "name" and value != item.default and isinstance(value, (str, int, float, list)) and value:
            options[item.name] = without_folder(value) if isinstance(value, str) else value
    return options


def model_facts(model: ModelSource, pipeline: DiffusionPipeline, fingerprint: str) -> dict:
    """What results record of a model: its options, what was loaded, and its fingerprint in the manifest."""
    return {
        **options_of(model),
        "pipeline": type(pipeline).__name__,
        "fingerprint": fingerprint,
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
    }


def without_folder(text: str) -> str:
    """The name of an existing path, without its folder: results are published, and local paths are private."""
    try:
        path = Path(text)
        return embedded_name(path) or path.resolve().name if path.exists() else text
    except (OSError, ValueError):  # too long for a path, or not one
        return text
