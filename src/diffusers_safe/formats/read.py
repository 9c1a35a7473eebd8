"""Reads every kind of file that an erasure comes in, strictly: what does not fit is an error, never a warning."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..families import (
    TRAIN_METHODS,
    denoiser_names,
    families,
    family_of_class,
    family_of_denoiser,
)
from ..loading import load_model
from ..model_errors import ModelError, naming, shown
from ..model_files import check_regular, describe_weights, load_pickle, read_json_object
from ..provenance import FILE_NAME, UNKNOWN, Provenance, fingerprint, located, stored_path
from .folders import INDEX
from .lora import by_module_names, is_lora, largest_rank, plain_names, read_differences
from .write import KOHYA_NAME, LORA_NAME, PARTIAL_FORMAT, PARTIAL_NAME, known_facts


# format -> what it is; `read_erased_weights` distinguishes them by their content
FORMATS = {
    "partial": "safetensors of this package: the erased weights, and which model they belong to",
    "esd": "safetensors of ESD (2025): some weights of a denoiser, by diffusers' names",
    "esd-alt": 'pickle of ESD\'s alt script: {"<component>.<module>": {"weight", "bias"}}',
    "ldm": "CompVis checkpoint (.ckpt, .pt or .safetensors), whole",
    "whole": "denoiser of diffusers, whole: a folder or a pickle; or a pickle of the weights of a train method",
    "lora": "LoRA of a denoiser, by the names of diffusers, peft or kohya-ss",
}
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)
_ESD_FORMAT = "erasing-esd-v2"
# Our name of a train method by each of its names; ESD's file names have it with or without its dashes.
_ESD_METHODS = {name: name for name in TRAIN_METHODS} | {
    method.alias: name for name, method in TRAIN_METHODS.items() if method.alias
}
_METHOD = "(?P<method>" + "|".join(name.replace("-", "-?") for name in _ESD_METHODS) + ")"
_ESD_NAMES = (
    re.compile(rf"esd-(?P<concept>.+)-from-(?P<erase_from>.+?)-{_METHOD}"),
    re.compile(
        rf"esd-(?P<concept>.+)_from_(?P<erase_from>.+?)-{_METHOD}_(?P<negative_guidance>[\d.]+)"
        r"-epochs_(?P<iterations>\d+)"
    ),
)
_ESD_ARGUMENTS = ("guidance", "guidance_scale", "negative_guidance", "num_inference_steps", "erase_from")
_LDM_DENOISER = "model.diffusion_model."
# The other parts of a CompVis checkpoint, which ESD does not train; the noise schedule's names have no dots.
_LDM_OTHERS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "model_ema.", "denoiser.")


@dataclass
class ErasedWeights:
    """What one file or folder says about a denoiser's weights.

    Attributes:
        weights (`dict[str, torch.Tensor]`): By the names of the denoiser's parameters; of a LoRA, what is added to
            them; of a CompVis checkpoint, by its own names, until a denoiser determines how they are converted.
        format (`str`): A name of `FORMATS`.
        source (`str`): Where it was read.
        known (`dict`): Those fields of [`Provenance`] that the file, its name or its folder give.
        rank (`int`, *optional*): Of a LoRA, its largest.
    """

    weights: dict[str, torch.Tensor]
    format: str
    source: str
    known: dict = field(default_factory=dict)
    rank: int | None = None

    def provenance(self, base_model: str, revision: str | None, base_fingerprint: str) -> Provenance:
        """The record of this erasure, given the base model that it fits. What is not known is `"unknown"` or empty."""
        base = {"base_model": stored_path(base_model), "revision": revision, "base_fingerprint": base_fingerprint}
        if self.known.get("base_fingerprint") == base_fingerprint:
            base |= {name: self.known.get(name) for name in ("base_model", "revision")}  # the same, by its own name
        return Provenance(**{**UNKNOWN, **self.known, **base})

    def values(self, denoiser: nn.Module) -> dict[str, torch.Tensor]:
        """The values that parameters of the base model's denoiser get, in its dtype and on its device.

        Args:
            denoiser (`nn.Module`): The base model's; it is not changed.

        Raises:
            `ValueError`: If it is not the base model of this erasure, as far as that is known; or a name, a shape or a
                value does not fit; or a whole denoiser lacks something.
        """
        return dict(self._values(denoiser))

    @torch.no_grad()
    def _values(self, denoiser: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """All of it is checked before the first value is given; one at a time is on the denoiser's device."""
        self._check_base(denoiser)
        parameters, family = plain_parameters(denoiser), family_of_denoiser(denoiser)
        weights = self.weights
        if self.format == "ldm":
            weights = self._converted(denoiser)
        elif self.format == "lora":
            weights = by_module_names(weights, denoiser)
        for name, value in weights.items():
            if name not in parameters:
                raise self._error(f"the denoiser has no parameter {name}{self._other_family(name, denoiser)}")
            if parameters[name].shape != value.shape:
                shapes = f"{tuple(value.shape)}, the denoiser's has {tuple(parameters[name].shape)}"
                raise self._error(f"{name} has shape {shapes}")
            if not (value.is_floating_point() and value.isfinite().all()):
                raise self._error(f"{name} holds values that are not finite numbers")
        missing = [name for name in parameters if name not in weights] if self.format in ("ldm", "whole") else []
        if missing and not (self.format == "whole" and family.find_train_method(denoiser, weights)):
            held = f"holds {len(weights)} of the denoiser's {len(parameters)} parameters; missing is {missing[0]}"
            hint = "" if self.format == "ldm" else (
                ": neither all nor those of a train method; if it is meant to be a part, save it as .safetensors"
            )  # fmt: skip
            raise self._error(held + hint)
        for name, value in weights.items():
            parameter, value = parameters[name], value.to(parameters[name].device)
            yield name, (parameter.float() + value if self.format == "lora" else value).to(parameter.dtype)

    def changes(self, denoiser: nn.Module) -> dict[str, torch.Tensor]:
        """Those of [`~ErasedWeights.values`] that are not the denoiser's own already.

        Raises:
            `ValueError`: As [`~ErasedWeights.values`], or if there are none.
        """
        parameters = plain_parameters(denoiser)
        changes = {name: value for name, value in self._values(denoiser) if not torch.equal(parameters[name], value)}
        if not changes:
            raise self._error("nothing was erased, all weights are the base model's")
        return changes

    def apply(self, denoiser: nn.Module) -> None:
        """Gives the base model's denoiser these weights; nothing changes unless all of it fits.

        Raises:
            `ValueError`: As [`~ErasedWeights.values`].
        """
        assign(denoiser, self.values(denoiser))

    def _other_family(self, name: str, denoiser: nn.Module) -> str:
        """Whose layer a LoRA names that is not the denoiser's."""
        kohya = any(name.startswith(family.kohya_prefix) for family in families())
        return f"; the LoRA is of another kind of model than {type(denoiser).__name__}" if kohya else ""

    def _error(self, reason: str) -> ModelError:
        return ModelError(f"{self.source}: {reason}")

    def _check_base(self, denoiser: nn.Module) -> None:
        expected = self.known.get("base_fingerprint")
        if expected is None or expected == (own := fingerprint(denoiser)):
            return
        dtype = next(denoiser.parameters()).dtype
        halved = f", in {dtype}; load it in float32 and cast it afterwards" if dtype != torch.float32 else ""
        raise self._error(
            f"made for {self.known.get('base_model')} with fingerprint {expected}, this model's is {own}{halved}"
        )

    def _converted(self, denoiser: nn.Module) -> dict[str, torch.Tensor]:
        """A CompVis checkpoint's denoiser by diffusers' names. Of two sets of weights, it is the one that ESD trains,
        not the EMA."""
        try:
            converted = family_of_denoiser(denoiser).from_original(self.weights, denoiser)
        except (KeyError, TypeError, AttributeError, NotImplementedError) as error:
            raise self._error(f"not the CompVis form of this denoiser ({type(error).__name__}: {error})") from None
        used = {id(value) for value in converted.values()}
        if left := [name for name, value in self.weights.items() if id(value) not in used]:
            raise self._error(f"{left[0]} has no place in this denoiser")
        if none := [name for name, value in converted.items() if value is None]:
            raise self._error(f"lacks {none[0]}")
        return converted


def plain_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """By the names of the plain network, also where it is compiled or has LoRAs, whose own are left out."""
    return {
        name.replace("_orig_mod.", "").replace(".base_layer.", "."): parameter
        for name, parameter in denoiser.named_parameters()
        if ".lora_" not in name
    }


@torch.no_grad()
def assign(denoiser: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copies values into a denoiser's parameters; all names must be theirs."""
    parameters = plain_parameters(denoiser)
    for name, value in values.items():
        parameters[name].copy_(value)


def read_erased_weights(path: str | Path) -> ErasedWeights:
    """Reads an erasure of any of `FORMATS`.

    Args:
        path (`str` or `Path`): A file; or a folder: of a denoiser, of a pipeline, or with one file of an erasure. An
            `erasure.json` in the folder adds what the files do not say.

    Raises:
        `ValueError`: If there is no erasure, or a pickle holds more than tensors.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_folder(path)
    if not os.path.isfile(path):
        raise ModelError(f"{shown(path)}: no such file or folder, or none that can be read")
    if path.suffix == ".safetensors":
        erased = _read_safetensors(path)
    elif path.suffix in _PICKLES:
        erased = _read_pickle(path)
    else:
        raise ModelError(f"{path}: erased weights are in files ending in {', '.join(SUFFIXES)}")
    if not erased.weights:
        raise ModelError(f"{path}: holds no weights")
    return erased


def load_partial(denoiser: nn.Module, path: str | Path) -> dict[str, str]:
    """Loads a file of [`save_partial`] into the base model's denoiser; nothing changes unless all of it fits.

    Returns:
        `dict[str, str]`: The file's metadata.

    Raises:
        `ValueError`: If it is no such file, or as [`~ErasedWeights.apply`].
    """
    erased = read_erased_weights(path)
    if erased.format != "partial":
        raise ModelError(f"{path}: format '{erased.format}'; this reads partial; read_erased_weights reads all")
    erased.apply(denoiser)
    return _open_safetensors(Path(path))[1]


def load_denoiser(folder: str | Path) -> nn.Module:
    """The denoiser in a folder in fp32, whole: unlike diffusers' own loading it does not fill in what is missing.

    Raises:
        `ValueError`: If there is none, or its weights are not those of its config.
    """
    config = Path(folder, "config.json")
    class_name = read_json_object(config).get("_class_name") if config.is_file() else None
    return load_model((family_of_class(class_name) or families()[0]).denoiser_class, folder, torch.float32)


# --- folders ---------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> ErasedWeights:
    if (folder / PARTIAL_NAME).is_file():
        erased = read_erased_weights(folder / PARTIAL_NAME)
    elif (denoiser := denoiser_folder(folder)) is not None or (folder / INDEX).is_file():
        erased = _read_denoiser(denoiser or folder / denoiser_names()[0])
    elif (folder / "config.json").is_file():
        erased = _read_denoiser(folder)
    elif lora := next((name for name in (LORA_NAME, KOHYA_NAME) if (folder / name).is_file()), None):
        erased = read_erased_weights(folder / lora)
    else:
        erased = read_erased_weights(_only_file(folder))
    if (folder / FILE_NAME).is_file():
        record = vars(Provenance.load(folder))
        erased.known |= {name: value for name, value in record.items() if value is not None}
    return erased


def denoiser_folder(folder: Path) -> Path | None:
    """The folder of the denoiser in a model's folder, if there is one."""
    return next((folder / name for name in denoiser_names() if (folder / name / "config.json").is_file()), None)


def _read_denoiser(folder: Path) -> ErasedWeights:
    denoiser = load_denoiser(folder)
    return ErasedWeights({name: value.detach() for name, value in denoiser.named_parameters()}, "whole", str(folder))


def _only_file(folder: Path) -> Path:
    return folder / only_weight_file([path.name for path in folder.iterdir()], str(folder))


def only_weight_file(names: list[str], where: str) -> str:
    """The one among the files of a folder or repository that can hold weights.

    Raises:
        `ValueError`: If there is none, or more than one.
    """
    found = sorted(name for name in names if "/" not in name and name.endswith(SUFFIXES))
    if len(found) != 1:
        several = f"holds several files, of which weight_name must name one: {', '.join(found)}"
        raise ModelError(f"{where}: {several if found else 'holds no erased weights that can be read'}")
    return found[0]


# --- files -----------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with naming(str(path)), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a LoRA by names that diffusers reads, and whether they are others than in the file.

    Raises:
        `ValueError`: If it cannot be read, or is no LoRA.
    """
    check_regular(path)
    if path.suffix == ".safetensors":
        tensors, _ = _open_safetensors(path)
    else:
        tensors = _tensors(load_pickle(path), path)
    if not is_lora(list(tensors)):
        raise ModelError(f"{path}: {describe_weights(list(tensors))}, and no LoRA")
    try:
        plain = plain_names(tensors, path.parent)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    return plain, path.suffix != ".safetensors" or plain.keys() != tensors.keys()


def _read_safetensors(path: Path) -> ErasedWeights:
    tensors, metadata = _open_safetensors(path)
    written = metadata.get("format", "pt")
    if written not in ("pt", PARTIAL_FORMAT, _ESD_FORMAT):
        raise ModelError(f"{path}: format '{written}'; allowed are {PARTIAL_FORMAT}, {_ESD_FORMAT} and none")
    try:
        known = known_facts(metadata)
        if "base_model" in known:
            known["base_model"] = located(known["base_model"], path.parent, known.get("arguments"))
        if written == PARTIAL_FORMAT:
            return ErasedWeights(tensors, "partial", str(path), known)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    return _from_tensors(tensors, metadata, path, "esd", known)


def _from_tensors(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path, otherwise: str, known: dict
) -> ErasedWeights:
    """What the names in a file say that it is; `otherwise` a format of weights by a denoiser's own names."""
    if is_lora(list(tensors)):
        try:
            differences = read_differences(tensors, metadata, path.parent)
            return ErasedWeights(differences, "lora", str(path), known, largest_rank(tensors))
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from None
    if any(name.startswith(_LDM_DENOISER) for name in tensors):
        return ErasedWeights(_ldm_denoiser(tensors, path), "ldm", str(path), known)
    what = describe_weights(list(tensors))
    if not what.endswith(("denoiser", "unknown kind")):
        raise ModelError(f"{path}: {what}, and no erasure of a denoiser")
    for prefix in ("module.", "_orig_mod.", *(f"{name}." for name in denoiser_names())):  # of wrappers, of a pipeline
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return ErasedWeights(tensors, otherwise, str(path), _esd_facts(path, metadata))


def _esd_facts(path: Path, metadata: dict[str, str]) -> dict:
    """What the metadata of an ESD file says and, where it says nothing, its name."""
    known: dict = {"method": "esd"}
    if match := next(filter(None, (name.fullmatch(path.stem) for name in _ESD_NAMES)), None):
        said = match.groupdict()
        concept, erase_from = (said.pop(name).replace("_", " ") for name in ("concept", "erase_from"))  # as ESD does
        known |= {"concepts": [concept], "train_method": said.pop("method"), "arguments": said}
        if erase_from != concept:
            said["erase_from"] = erase_from
    if metadata.get("format") == _ESD_FORMAT:
        if (component := metadata.get("component")) not in (None, *denoiser_names()):
            allowed = " or ".join(denoiser_names())
            raise ModelError(f"{path}: component '{component}'; erased weights are read for the {allowed} only")
        if metadata.get("base_model_id"):
            known["base_model"] = metadata["base_model_id"]
        if metadata.get("train_method"):
            known["train_method"] = metadata["train_method"]
        if concept := metadata.get("erase_concept"):
            known["concepts"] = [concept]
        said = {name: metadata[name] for name in _ESD_ARGUMENTS if metadata.get(name)}
        if said.get("erase_from") in known.get("concepts", []):
            del said["erase_from"]
        known["arguments"] = {**known.get("arguments", {}), **said}
    if "train_method" in known:
        known["train_method"] = _esd_train_method(known["train_method"])
    return known if len(known) > 1 else {}


def _esd_train_method(written: str) -> str:
    """Our name of a train method as ESD writes it, with or without its dashes; an unknown one stays."""
    by_letters = {name.replace("-", ""): ours for name, ours in _ESD_METHODS.items()}
    return by_letters.get(written.replace("-", ""), written)


def _read_pickle(path: Path) -> ErasedWeights:
    state = load_pickle(path)
    # What Lightning and training loops put around it.
    wrappers = ("state_dict", "model_state_dict", *denoiser_names(), "model")
    while isinstance(state, dict) and (inner := [state[key] for key in wrappers if isinstance(state.get(key), dict)]):
        state = inner[0]
    if isinstance(state, dict) and not state.keys().isdisjoint(("image_proj", "string_to_param")):
        raise ModelError(f"{path}: {describe_weights(list(state))}, and no erasure of a denoiser")
    if isinstance(state, dict) and state and all(isinstance(part, dict) for part in state.values()):
        return ErasedWeights(_flat(state, path), "esd-alt", str(path), {"method": "esd", **_esd_facts(path, {})})
    return _from_tensors(_tensors(state, path), {}, path, "whole", {})


def _tensors(state: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ModelError(f"{path}: a {type(state).__name__}; weights by name are needed")
    if odd := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ModelError(
            f"{path}: '{odd[0]}' is of type {type(state[odd[0]]).__name__}; weights, tensors by name, are needed"
        )
    if odd := [name for name, value in state.items() if value.layout != torch.strided or value.is_quantized]:
        raise ModelError(f"{path}: {odd[0]} is a sparse or quantized tensor; a plain one is needed")
    return state


def _flat(state: dict[str, dict], path: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for module, parts in state.items():
        component, _, name_inside = module.partition(".")
        if component not in denoiser_names():
            raise ModelError(f"{path}: {module} is no module of the {' or '.join(denoiser_names())}")
        for name, value in parts.items():
            if name == "bias" and value is None:
                continue
            if name not in ("weight", "bias") or not isinstance(value, torch.Tensor):
                raise ModelError(f"{path}: {module} holds '{name}'; allowed are tensors named weight and bias")
            weights[f"{name_inside}.{name}"] = value
    return weights


def _ldm_denoiser(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    for name in state:
        if "." in name and not name.startswith((_LDM_DENOISER, *_LDM_OTHERS)):
            raise ModelError(f"{path}: {name} is no part of a CompVis checkpoint")
    return {name: value for name, value in state.items() if name.startswith(_LDM_DENOISER)}
