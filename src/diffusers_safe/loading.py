"""Loads diffusers models strictly: what is broken or missing is reported in one line with model and component.

diffusers and transformers fill missing tensors with random values, and raise errors of any type for files that
are damaged. Everything here raises a [`ModelError`] instead.
"""

import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .embedded import locate_model


logger = logging.getLogger(__name__)
_LIBRARIES = (diffusers.utils.logging, transformers.utils.logging)

# What `from_pretrained` of diffusers takes and the Hub's client knows by the same name.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_OPTIONS = {"dtype", "torch_dtype", "variant", "use_safetensors", *HUB_ARGUMENTS}
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5}(\.(?P<old>[^.]+))?)?"
    r"\.(safetensors|bin)"
)
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_JSON_TYPES = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
ALIGNMENT = 64  # bytes
_SCHEDULER_SETTINGS = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "original_sample", "flow_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
_MOST_TOKENS = 1_000_000  # transformers' number for "not known" is 1e30


class ModelError(ValueError):
    """A model that cannot be loaded. The message is one line that names the model and the component."""

    exit_code = 2


def reason(error: BaseException) -> str:
    """Why a file or a model cannot be read, in one line."""
    cause = error
    while (cause := cause.__cause__ or cause.__context__) is not None:  # the message of diffusers says less
        if isinstance(cause, (SafetensorError, pickle.UnpicklingError)):
            error = cause
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, SafetensorError):
        return f"not a whole safetensors file ({error})"
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"refused, the pickle holds more than tensors (it names {found[1]})"
            if found
            else "not a file of torch.save"
        )
    if isinstance(error, EOFError):
        return "it ends too early"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({str(error.filename)[-100:]})' if error.filename else ''}"
    if "PytorchStreamReader" in str(error):
        return "it is not whole"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).split(" If you want")[0]
    named = "" if type(error) in (ValueError, OSError) and text else type(error).__name__
    return f"{named}{': ' if named and text else ''}{text[:300]}"


def shown(name: str | Path) -> str:
    """A name or path as messages show it: what is very long is cut."""
    text = str(name).replace("\0", "\\0")
    return text if len(text) <= 500 else f"{text[:100]}...{text[-100:]}"


@contextmanager
def naming(what: str, *kept: type[Exception]) -> Iterator[None]:
    """Turns every error of the libraries that read a model into a [`ModelError`] that begins with `what`; those that
    are `kept` stay as they are."""
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError, *kept):
        raise
    except Exception as error:  # they raise errors of many types for a damaged file
        raise ModelError(f"{what}: {reason(error)}".replace(f" ({what})", "")) from error


# --- configs ---------------------------------------------------------------------------------------------------------


def read_json_object(path: Path) -> dict[str, Any]:
    """
    Raises:
        [`ModelError`]: If the file cannot be read, or holds no JSON object.
    """
    with naming(str(path)):
        value = json.loads(path.read_text(encoding="utf-8"))
    return _as_object(value, str(path))


def read_config(reader: type[ConfigMixin], name_or_path: str | Path, what: str, **where) -> dict[str, Any]:
    """A config as `reader.load_config` finds it, in a folder or on the Hub.

    Raises:
        [`ModelError`]: If there is none, or it is no JSON object.
    """
    with naming(what):
        config = reader.load_config(str(name_or_path), **where)
    return _as_object(config, what)


def _as_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        held = _JSON_TYPES.get(type(value), "object without entries")
        raise ModelError(f"{what}: holds a JSON {held}; an object with entries is needed")
    return value


def read_index(
    name_or_path: str | Path, what: str, kind: type[DiffusionPipeline] = DiffusionPipeline, **hub_arguments
) -> dict[str, Any]:
    """The `model_index.json` of a pipeline, checked: its class is a name, its components are `[library, class]`.

    Args:
        name_or_path (`str` or `Path`): Folder or Hub id.
        what (`str`): Names the model in messages.
        kind (`type`): Whose `load_config` reads it.
        hub_arguments: Some of `HUB_ARGUMENTS`.

    Raises:
        [`ModelError`]: If there is none, or it is not such an index.
    """
    name_or_path = locate_model(name_or_path)
    if (file := single_file(name_or_path)) is not None:
        raise ModelError(f"{what}: {how_to_convert(file)}")
    for path in (*Path(name_or_path).glob("*"), *Path(name_or_path).glob("*/*")):
        check_regular(path)
    try:
        index = kind.load_config(str(name_or_path), **hub_arguments)
    except Exception as error:  # see `naming`
        found = "folder" if os.path.exists(name_or_path) else "folder or Hub repository"
        why = f"no {found} of a diffusers pipeline (a folder needs a model_index.json): {reason(error)}"
        raise ModelError(f"{what}: {why}") from error
    index = _as_object(index, f"{what}: model_index.json")
    class_name = index.get("_class_name")
    if isinstance(class_name, list) and len(class_name) == 2:
        class_name = class_name[-1]
    if not (isinstance(class_name, str) and class_name):
        raise ModelError(f"{what}: model_index.json: _class_name {class_name!r}: must be the name of a pipeline class")
    pipeline_class = getattr(diffusers, class_name, None)
    is_pipeline = isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)
    parts = ()
    if pipeline_class is not None and not is_pipeline:
        raise ModelError(f"{what}: model_index.json: _class_name {class_name} is no pipeline of diffusers")
    if is_pipeline:
        parts = pipeline_class._get_signature_keys(pipeline_class)[0]
    for name, entry in index.items():
        if name.startswith("_") or not (name in parts or isinstance(entry, (list, tuple))):
            continue
        is_pair = isinstance(entry, (list, tuple)) and len(entry) == 2
        if not is_pair or not (all(isinstance(part, str) for part in entry) or list(entry) == [None, None]):
            raise ModelError(f"{what}: model_index.json: {name} {str(entry)[:60]!r}: must be [library, class]")
    scheduler = getattr(diffusers, str((index.get("scheduler") or [None])[-1]), SchedulerMixin)
    if not (isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)):
        raise ModelError(f"{what}: model_index.json: scheduler {index['scheduler'][-1]} is no scheduler")
    return index


def check_complete(index: dict[str, Any], what: str, passed: Collection[str] = ()) -> None:
    """
    Raises:
        [`ModelError`]: If a component is missing that the pipeline's class needs, and that is not `passed` to it.
    """
    name = index["_class_name"]
    kind = getattr(diffusers, name if isinstance(name, str) else name[-1], None)
    if kind is None:
        return
    needed = {*kind._get_signature_keys(kind)[0]} - {*kind._optional_components, *passed}
    if lacking := sorted(needed - components(index).keys()):
        raise ModelError(f"{what}: model_index.json: has no {lacking[0]}; {kind.__name__} needs one")


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The components that an index names: library and class, by name."""
    pairs = {name: tuple(entry) for name, entry in index.items() if isinstance(entry, (list, tuple))}
    return {name: pair for name, pair in pairs.items() if not name.startswith("_") and pair[0] is not None}


def class_of(library: str, class_name: str, what: str) -> type | None:
    """The class of a component; `None` where the library is another than diffusers and transformers."""
    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    module = getattr(diffusers.pipelines, library, None) if module is None else module
    if module is None:
        return None
    kind = getattr(module, class_name, None)
    if not hasattr(kind, "from_pretrained"):
        version = getattr(module, "__version__", diffusers.__version__)
        raise ModelError(f"{what}: {library} {version} has no class {class_name} that loads a component")
    return kind


# --- files of weights ------------------------------------------------------------------------------------------------


def folder_of(folder: Path, part: str) -> Path:
    place = folder / part
    if not place.is_dir():
        raise ModelError(f"{place}: no such folder, or none that can be read")
    return place


def weight_files(folder: Path) -> dict[str | None, list[Path]]:
    """The files of weights in a component's folder, by their variant."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _WEIGHTS.fullmatch(path.name):
            found.setdefault(match["variant"] or match["old"], []).append(path)
    return found


def find_variant(folder: Path, variant: str | None = None) -> str | None:
    """The variant of the weights in a component's folder that is loaded: the one that is asked for; where there is
    none of it, weights without a variant; and where all weights are of one variant, that one.

    Raises:
        [`ModelError`]: If there are no weights, none of the variants can be taken, or a file is damaged.
    """
    found = weight_files(folder)
    if not found:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "nothing"
        raise ModelError(f"{folder}: no weights (.safetensors or .bin) that diffusers knows by name; it holds {held}")
    names = [name for name in found if name is not None]
    if variant in found:
        taken = variant
    elif None in found:
        taken = None
        if variant is not None:
            logger.warning("%s: has no variant %s; the weights without a variant are loaded", folder, variant)
    elif len(names) == 1 and variant is None:
        taken = names[0]
        logger.warning("%s: all weights are of the variant %s, which is loaded", folder, taken)
    else:
        asked = f"variant {variant}" if variant else "weights without a variant"
        raise ModelError(f"{folder}: no {asked}; give --variant {' or '.join(names)}")
    files = [path for path in found[taken] if path.suffix == ".safetensors"]
    quantized = "quantization_config" in read_json_object(folder / "config.json")
    for path in files or found[taken]:
        check_header(path, quantized)
    for path in folder.glob("*.index*.json"):
        shards = read_json_object(path).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError(f"{path}: weight_map: must name a file for each tensor")
        for name in sorted(set(shards.values())):
            if not (folder / name).is_file() or Path(name).name != name:
                raise ModelError(f"{path}: the shard {name} is missing")
    return taken


def check_regular(path: Path) -> None:
    """
    Raises:
        [`ModelError`]: If it is a pipe or a device, of which reading may never end.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ModelError(f"{path}: is not a regular file")


def check_header(path: Path, quantized: bool = True) -> None:
    """Opens a file of weights, whose values may be integers where it is quantized; no values are read.

    Raises:
        [`ModelError`]: If it is damaged.
    """
    with naming(str(path)):
        check_regular(path)
        with open(path, "rb") as file:
            if not file.read(1):
                raise ModelError(f"{path}: is empty")
        if path.suffix == ".bin":
            load_pickle(path, "meta", mmap=is_zipfile(path))  # shapes; no values are read
        else:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    kind = file.get_slice(name).get_dtype()
                    if name.endswith((".weight", ".bias")) and kind[0] in "IUB" and kind != "BF16" and not quantized:
                        raise ModelError(f"{path}: {name} holds integers ({kind}); floating point is needed")


def load_pickle(path: Path, device: str = "cpu", mmap: bool = False) -> Any:
    """What a file of torch.save holds: nothing but tensors and containers of them.

    Raises:
        [`ModelError`]: If it holds more, or is damaged.
    """
    with naming(str(path)):
        try:
            return torch.load(path, device, weights_only=True, mmap=mmap)
        except (OSError, MemoryError, pickle.UnpicklingError):
            raise
        except Exception as error:  # of many types
            raise ModelError(f"{path}: not a file of torch.save ({reason(error)})") from error


def single_file(name_or_path: str | Path) -> Path | None:
    """The path of a model that is one file of weights instead of a folder."""
    path = Path(name_or_path)
    return path if path.suffix in _SINGLE_FILES and os.path.isfile(path) else None


def how_to_convert(file: Path) -> str:
    """What to do with a single file of weights where a folder is needed."""
    names = []
    if file.suffix == ".safetensors":
        with naming(str(file)), safe_open(file, framework="pt") as header:
            names = list(header.keys())
    what = describe_weights(names)
    if names and not what.startswith("a checkpoint"):
        return f"{what}, and no model; a folder of a diffusers pipeline is needed"
    is_xl = any(name.startswith("conditioner.embedders.1.") for name in names)
    kind = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    folder = file.with_suffix("")
    return (
        f'a single file; convert it once to a folder, and give that: python -c "from diffusers import {kind} as P; '
        f"P.from_single_file('{file}').save_pretrained('{folder}')\" (offline, add config='FOLDER' of a model of the "
        "same architecture)"
    )


def describe_weights(names: list[str]) -> str:
    """What a file holds, by the names of its tensors."""

    def any_name(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if any(name.startswith("model.diffusion_model.") for name in names):
        return "a checkpoint of a whole model"
    if any_name("ip_adapter", "image_proj"):
        return "an IP-Adapter"
    if any_name("string_to_param", "emb_params") or (names and not any_name(".")):
        return "a textual inversion embedding"
    if any_name("hada_w1", "lokr_w", "oft_", "dora_scale", "lora_magnitude_vector", "lora_mid"):
        return "a LyCORIS file (LoHa, LoKr, DoRA or another relative of LoRA)"
    if any_name("lora"):
        return "a LoRA"
    if any_name("controlnet_cond_embedding", "zero_convs", "control_model."):
        return "a ControlNet"
    if any_name("text_model.encoder.layers", ".resblocks."):
        return "weights of a text encoder"
    if any_name("decoder.up_blocks", "decoder.up.", "quant_conv."):
        return "weights of an autoencoder (VAE)"
    if any_name("motion_modules"):
        return "a motion adapter"
    if any_name("down_blocks", "up_blocks", "mid_block"):
        return "weights of a denoiser"
    return "weights of an unknown kind"


# --- models ----------------------------------------------------------------------------------------------------------


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
