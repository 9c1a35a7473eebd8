"""The model families that are known: registering one, and finding the family of a pipeline, a denoiser or a file."""

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .. import loading
from .base import ModelFamily
from .train_methods import TRAIN_METHODS


ENTRY_POINTS = "diffusers_safe.families"
_registered: list[type[ModelFamily]] = []


def register_family(family: type[ModelFamily]) -> type[ModelFamily]:
    """Makes a family known; a class decorator.

    Another package names the module or the class of its family in an entry point of the group
    `diffusers_safe.families`, which is loaded when a family is first looked for.

    Raises:
        `ValueError`: If a pipeline class belongs to another family already, or a train method is unknown.
    """
    taken = {kind.__name__: other for other in _registered for kind in other.pipeline_classes}
    for kind in family.pipeline_classes:
        if kind.__name__ in taken:
            raise ValueError(f"{family.__name__}: {kind.__name__} belongs to {taken[kind.__name__].__name__} already")
    if unknown := sorted(family.train_methods.keys() - TRAIN_METHODS.keys()):
        raise ValueError(
            f"{family.__name__}: unknown train method {unknown[0]}; allowed are {', '.join(TRAIN_METHODS)}"
        )
    _registered.append(family)
    return family


def families() -> tuple[type[ModelFamily], ...]:
    """All families, in the order in which they were registered."""
    _load_entry_points()
    return tuple(_registered)


@cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        loaded = point.load()
        is_family = isinstance(loaded, type) and issubclass(loaded, ModelFamily)
        if is_family and loaded not in _registered:
            register_family(loaded)


def denoiser_names() -> tuple[str, ...]:
    """The names that pipelines have for their denoiser, each once."""
    return tuple(dict.fromkeys(family.denoiser_name for family in families()))


def find_family(*class_names: str) -> type[ModelFamily]:
    """The family of the first name of a pipeline's class that has one.

    Raises:
        `ValueError`: If none has.
    """
    known = {kind.__name__: family for family in families() for kind in family.pipeline_classes}
    for name in class_names:
        if name in known:
            return known[name]
    raise ValueError(
        f"{class_names[0]}: this model family is not supported yet; supported pipelines are {', '.join(known)}"
    )


def family_of_pipeline(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> type[ModelFamily]:
    """The family of a pipeline, or of a pipeline class, by the classes that it extends.

    Raises:
        `ValueError`: If it is of no supported family.
    """
    kind = pipeline if isinstance(pipeline, type) else type(pipeline)
    return find_family(*(base.__name__ for base in kind.__mro__))


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The denoiser of a pipeline of a supported family.

    Raises:
        `ValueError`: As [`family_of_pipeline`].
    """
    return getattr(pipeline, family_of_pipeline(pipeline).denoiser_name)


def family_of_denoiser(denoiser: nn.Module) -> type[ModelFamily]:
    """The first family with denoisers of this class, compiled or not.

    Families that share the class (SD and SDXL) share all that is asked of a denoiser alone: its parameters, its
    inputs, its names in files.

    Raises:
        `ValueError`: If there is none.
    """
    plain = getattr(denoiser, "_orig_mod", denoiser)
    for family in families():
        if isinstance(plain, family.denoiser_class):
            return family
    known = dict.fromkeys(family.denoiser_class.__name__ for family in families())
    raise ValueError(f"{type(plain).__name__}: not a supported denoiser; supported are {', '.join(known)}")


def family_around(pipeline: DiffusionPipeline) -> type[ModelFamily] | None:
    """The first family whose denoiser a pipeline has, whatever the class of the pipeline (ControlNet, image to image);
    `None` if it has none."""
    for family in families():
        denoiser = getattr(pipeline, family.denoiser_name, None)
        if isinstance(getattr(denoiser, "_orig_mod", denoiser), family.denoiser_class):
            return family
    return None


def family_of_class(class_name: str | None) -> type[ModelFamily] | None:
    """The first family whose denoisers have a class of this name, as a denoiser's config says; `None` if none has."""
    return next((family for family in families() if family.denoiser_class.__name__ == class_name), None)


def family_of_names(names: Iterable[str]) -> type[ModelFamily] | None:
    """The first family whose denoiser can have parameters or modules with these names; `None` if none can."""
    names = list(names)
    return next((family for family in families() if all(map(family.is_denoiser_name, names))), None)


def own_pipelines() -> dict[str, type[DiffusionPipeline]]:
    """Pipeline classes of the families that are not in diffusers, by name."""
    kinds = (kind for family in families() for kind in family.pipeline_classes)
    return {kind.__name__: kind for kind in kinds if not kind.__module__.startswith("diffusers.")}


def load_pipeline(name_or_path: str, **hub_arguments) -> DiffusionPipeline:
    """Loads a pipeline in fp32, as training needs it.

    Raises:
        `ValueError`: If a component is missing or damaged.
    """
    what = f"model '{name_or_path}'"
    return loading.load_pipeline(name_or_path, what, own_kinds=own_pipelines(), dtype=torch.float32, **hub_arguments)


def make_family(pipeline: DiffusionPipeline, resolution: int | None = None) -> ModelFamily:
    """The family for a loaded pipeline.

    Args:
        pipeline (`DiffusionPipeline`): Of a supported family.
        resolution (`int`, *optional*): Height and width of an image, in pixels; latents have the size that belongs
            to it. The model's own if left out.

    Raises:
        `ValueError`: If its family is not supported, or [`ModelFamily.check`] refuses it.
    """
    return family_of_pipeline(pipeline)(pipeline, resolution)
