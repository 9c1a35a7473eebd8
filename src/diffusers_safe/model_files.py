"""The files of a model: indices, configs and weights, checked before they are loaded."""

import json
import logging
import os
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from safetensors import safe_open

from .embedded import locate_model
from .model_errors import ModelError, naming, reason


logger = logging.getLogger(__name__)
# What `from_pretrained` of diffusers takes and the Hub's client knows by the same name.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5}(\.(?P<old>[^.]+))?)?"
    r"\.(safetensors|bin)"
)
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# What to do with a file that is no model, by the end of `describe_weights`.
_INSTEAD = {
    "LoRA": ", and the LoRA as --lora",
    "denoiser": ": diffusers-safe export makes one of erased weights and their --base_model",
}
_JSON_TYPES = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


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
    if file.suffix == ".safetensors":
        with naming(str(file)), safe_open(file, framework="pt") as header:
            names = list(header.keys())
    else:
        held = load_pickle(file, "meta", mmap=is_zipfile(file))
        held = held.get("state_dict", held) if isinstance(held, dict) else {}
        names = [name for name in held if isinstance(name, str)] if isinstance(held, dict) else []
    what = describe_weights(names)
    if not what.startswith("a checkpoint"):
        hint = next((hint for kind, hint in _INSTEAD.items() if what.endswith(kind)), "")
        return f"{what}, and no model; a folder of a diffusers pipeline is needed{hint}"
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
