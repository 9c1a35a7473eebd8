"""Loads diffusers models strictly: what is broken or missing is reported in one line with model and component.

diffusers and transformers fill missing tensors with random values, and raise errors of any type for files that
are damaged. Everything here raises a [`ModelError`] instead.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .embedded import locate_model
from .model_errors import ModelError, naming, shown
from .model_files import (
    HUB_ARGUMENTS,
    check_complete,
    class_of,
    components,
    find_variant,
    folder_of,
    read_index,
    read_json_object,
)


_LIBRARIES = (diffusers.utils.logging, transformers.utils.logging)
_OPTIONS = {"dtype", "torch_dtype", "variant", "use_safetensors", *HUB_ARGUMENTS}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALIGNMENT = 64  # bytes
_SCHEDULER_SETTINGS = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "original_sample", "flow_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
_MOST_TOKENS = 1_000_000  # transformers' number for "not known" is 1e30


def load_pipeline(
    name_or_path: str | Path,
    what: str,
    kind: type[DiffusionPipeline] = DiffusionPipeline,
    build: Callable[..., DiffusionPipeline] | None = None,
    own_kinds: Mapping[str, type[DiffusionPipeline]] | None = None,
    **options,
) -> DiffusionPipeline:
    """A pipeline whose components are all there, whole and finite.

    Args:
        name_or_path (`str` or `Path`): Folder or Hub id.
        what (`str`): Names the model in messages.
        kind (`type`): Of the pipeline; default what the index names.
        build (`Callable`, *optional*): The `from_pretrained` of `kind`, where that one calls this function.
        own_kinds (`Mapping[str, type]`, *optional*): Pipeline classes that are not in diffusers, by their names in the
            index.
        options: Of `from_pretrained`.

    Raises:
        [`ModelError`]: If a component is missing or damaged, or its weights are not those of its config.
    """
    index = read_index(name_or_path, what, kind, **{name: options[name] for name in HUB_ARGUMENTS if name in options})
    if own_kinds and str(index["_class_name"]) in own_kinds:
        kind = own_kinds[index["_class_name"]]
    build = build or kind.from_pretrained
    check_complete(index, what, options)
    names = components(index)
    if options.keys() - _OPTIONS - index.keys() - set(kind._get_signature_keys(kind)[1]):  # device_map, quantization
        with naming(what):
            return build(locate_model(name_or_path), **options)
    folder = Path(locate_model(name_or_path))
    if not os.path.isdir(folder):
        with naming(what):
            folder = Path(kind.download(str(name_or_path), **{k: v for k, v in options.items() if "dtype" not in k}))
    dtype = options.get("dtype", options.get("torch_dtype"))
    loaded = {}
    for name, (library, class_name) in names.items():
        if name in options:
            continue
        with naming(f"{what}: {name}"):
            part_class = class_of(library, class_name, f"{what}: {name}")
            place = folder_of(folder, name)
            if part_class is None:
                continue  # left to diffusers
            if issubclass(part_class, (ModelMixin, PreTrainedModel)):
                own = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
                loaded[name] = load_model(part_class, place, own, options.get("variant"))
            else:
                loaded[name] = part_class.from_pretrained(place)
                check_component(loaded[name], f"{what}: {name}")
    with naming(what), without_progress_bars():
        others = {name: value for name, value in options.items() if name not in (*HUB_ARGUMENTS, "variant")}
        if index.get("requires_safety_checker") and not any(index.get("safety_checker") or ()):
            others.setdefault("requires_safety_checker", False)  # or diffusers says that it was disabled
        pipeline = build(folder, **{**others, **loaded})
        pipeline.register_to_config(_name_or_path=str(name_or_path))
    return pipeline


def load_model(
    kind: type[nn.Module],
    name_or_path: str | Path,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    **hub_arguments,
) -> nn.Module:
    """One component with all its weights, each finite: unlike the libraries' own loading, this does not fill in
    what is missing.

    Raises:
        [`ModelError`]: If it cannot be loaded, or its weights are not those of its config.
    """
    name_or_path = locate_model(name_or_path)
    place, quantized = Path(name_or_path, subfolder or ""), False
    what = str(place)
    with naming(what):
        if os.path.isdir(name_or_path):
            quantized = "quantization_config" in read_json_object(place / "config.json")
            variant = find_variant(place, variant)
        options = {"variant": variant, "subfolder": subfolder, **hub_arguments}
        if issubclass(kind, PreTrainedModel):
            options["ignore_mismatched_sizes"] = True  # an error below, which names the tensor
        options = {name: value for name, value in options.items() if value is not None}
        with _quiet():  # what they warn of is an error below
            model, info = kind.from_pretrained(str(name_or_path), dtype=dtype, output_loading_info=True, **options)
    if quantized:
        return model
    # A transformers model may be stored with more than it is: SD's own text encoders are.
    faults = ["missing_keys", "mismatched_keys", "error_msgs"]
    for fault in [*faults, "unexpected_keys"] if issubclass(kind, ModelMixin) else faults:
        if odd := sorted(map(str, info.get(fault) or ())):
            more = f" and {len(odd) - 1} more" if odd[1:] else ""
            raise ModelError(f"{what}: the weights do not fit config.json: {fault} {odd[0]}{more}")
    check_finite(model, what)
    align_weights(model)
    return model


def align_weights(model: nn.Module) -> None:
    """Copies weights on the CPU that do not begin at a multiple of 64 bytes to memory where they do.

    Files are mapped into memory, and the length of a file's header decides where its tensors begin. Matrix products
    round differently there, so the same weights would compute other last bits from another file, or after a move.
    """
    for value in (*model.parameters(), *model.buffers()):
        if value.device.type == "cpu" and value.data_ptr() % ALIGNMENT:
            value.data = value.data.clone()


def check_finite(model: nn.Module, what: str) -> None:
    """
    Raises:
        [`ModelError`]: If a parameter holds values that are not finite numbers.
    """
    for name, value in model.named_parameters():
        if value.dtype in _FLOATS and not value.is_meta and not value.isfinite().all():
            raise ModelError(f"{what}: {name} holds values that are not finite numbers")


def check_in_memory(model: nn.Module, what: str) -> None:
    """
    Raises:
        [`ModelError`]: If weights are not there.
    """
    if any(weight.is_meta for weight in model.parameters()):
        raise ModelError(f"{what}: its weights are on the meta device, not loaded or offloaded; load them first")


def dtypes_of(model: nn.Module) -> str:
    """The dtypes of a model's weights, as messages show them; usually one."""
    kinds = {str(value.dtype).removeprefix("torch.") for value in model.parameters() if value.is_floating_point()}
    return " and ".join(sorted(kinds))


def check_component(component: Any, what: str) -> None:
    """Finds in a tokenizer or scheduler what the libraries refuse only while they generate.

    Raises:
        [`ModelError`]: If it is a tokenizer of CLIP that does not say how long a prompt may be, or a scheduler with a
            setting that none has.
    """
    is_clip = isinstance(component, PreTrainedTokenizerBase) and "CLIP" in type(component).__name__
    if is_clip and not (isinstance(component.model_max_length, int) and component.model_max_length < _MOST_TOKENS):
        raise ModelError(f"{what}: tokenizer_config.json lacks model_max_length, how many tokens a prompt may have")
    if isinstance(component, SchedulerMixin):
        for name, allowed in _SCHEDULER_SETTINGS.items():
            if (value := component.config.get(name, allowed[0])) not in allowed:
                raise ModelError(f"{what}: {name} '{shown(value)}': unknown; allowed are {', '.join(allowed)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings and progress bars."""
    before = [(library, library.get_verbosity()) for library in _LIBRARIES]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Without diffusers' bar for the parts of a pipeline and transformers' for the weights of a part; those of
    downloads, which transformers switches as well, stay."""
    shown = [library for library in _LIBRARIES if library.is_progress_bar_enabled()]
    downloads = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    for library in shown:
        library.disable_progress_bar()
    downloads()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
        downloads()
