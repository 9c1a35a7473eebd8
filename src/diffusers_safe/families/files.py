"""The files of a model in a local folder, checked before any weights are read."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from safetensors import safe_open
from transformers import PreTrainedModel

from ..embedded import locate_model
from ..loading import check_component
from ..model_errors import ModelError, naming
from ..model_files import (
    check_complete,
    class_of,
    components,
    find_variant,
    folder_of,
    read_index,
    read_json_object,
    weight_files,
)
from .registry import families, family_of_class


def check_files(folder: str | Path, what: str, variant: str | None = None) -> None:
    """Checks the files of a local pipeline before any weights are read: for each component its folder, config and
    weights, the headers of safetensors files, and that no shard is missing.

    Raises:
        [`ModelError`]: If something is missing or damaged.
    """
    if not os.path.isdir(folder := locate_model(folder)):
        return  # on the Hub
    folder, index = Path(folder), read_index(folder, what)
    check_complete(index, what)
    denoisers = tuple(family.denoiser_class for family in families())
    for part, (library, class_name) in components(index).items():
        label = f"{what}: {part}"
        with naming(label):
            kind = class_of(library, class_name, label)
            place = folder_of(folder, part)
            if kind is None:
                continue
            for path in place.glob("*.json"):
                read_json_object(path)
            if issubclass(kind, (*denoisers, AutoencoderKL)):
                _check_shapes(kind, place, find_variant(place, variant))
            elif issubclass(kind, (ModelMixin, PreTrainedModel)):
                find_variant(place, variant)
            else:
                check_component(kind.from_pretrained(place), label)
    with naming(what):
        _check_together(folder, components(index))


def _check_together(folder: Path, parts: dict[str, tuple[str, str]]) -> None:
    """Whether the components around a denoiser fit it."""

    def config(name: str) -> dict[str, Any] | None:
        if name not in parts:
            return None
        return {**read_json_object(folder / name / "config.json"), "_class_name": parts[name][1]}

    for part, (_, class_name) in parts.items():
        family = family_of_class(class_name)
        if family is not None and family.denoiser_name == part:
            family.check_components(config)


def _check_shapes(kind: type[ModelMixin], folder: Path, variant: str | None) -> None:
    """Compares the headers of safetensors files with the config, on the meta device."""
    config = read_json_object(folder / "config.json")
    with naming(str(folder / "config.json")), torch.device("meta"):
        model = kind.from_config(config)
    files = [path for path in weight_files(folder)[variant] if path.suffix == ".safetensors"]
    if not files or "quantization_config" in config:
        return
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with naming(str(path)), safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    model._fix_state_dict_keys_on_load(found)  # old names of an autoencoder's attention
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    lacking, extra = expected.keys() - found, found.keys() - expected
    for names, fault in ((lacking, "the weights lack"), (extra, "config.json has no place for")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"{folder}: {fault} {min(names)}{more}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelError(f"{folder}: {name} has shape {found[name]}, by config.json {shape}")
