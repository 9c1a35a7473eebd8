"""Files that hold only what was trained: partial safetensors with metadata, read strictly, and LoRAs for everyone."""

import json
import os
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA_NAME
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .lora import ADAPTER_NAME, adapted_component
from .provenance import Provenance, fingerprint


PARTIAL_NAME = "erased_weights.safetensors"
_FORMAT = "diffusers-safe-partial-1"


def save_partial(weights: dict[str, torch.Tensor], provenance: Provenance, path: str | Path) -> None:
    """Writes selected weights of a denoiser, with the facts of the erasure in the file's metadata.

    Args:
        weights (`dict[str, torch.Tensor]`): By the names of the denoiser's parameters.
        provenance (`Provenance`): Names the base model; its fingerprint is checked on loading.
        path (`str` or `Path`): The `.safetensors` file; it is whole or absent.
    """
    _save_whole(weights, path, {"format": _FORMAT, **_facts(provenance)})


def save_lora(pipeline: DiffusionPipeline, provenance: Provenance, path: str | Path) -> None:
    """Writes an erasure trained as adapters as a LoRA that `load_lora_weights` of a stock pipeline takes.

    The names are peft's, which diffusers reads for every kind of layer (its older ones exist for attention only). The
    metadata holds what the adapters' `LoraConfig` cannot be without, so that any version of peft reads it, and the
    facts of the erasure: a LoRA gets separated from its erasure.json.

    Args:
        pipeline (`DiffusionPipeline`): With the adapters of [`LoRAWeights`] in its denoiser.
        provenance (`Provenance`): Names the base model.
        path (`str` or `Path`): The `.safetensors` file; it is whole or absent.
    """
    path = Path(path)
    component = adapted_component(pipeline)
    denoiser = getattr(pipeline, component)
    config = denoiser.peft_config[ADAPTER_NAME]
    adapter = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    weights = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pipeline.save_lora_weights(
            folder, **{f"{component}_lora_layers": weights, f"{component}_lora_adapter_metadata": adapter}
        )
        with safe_open(Path(folder) / LORA_NAME, framework="pt") as file:
            metadata = {**file.metadata(), **_facts(provenance)}
            _save_whole({name: file.get_tensor(name) for name in file.keys()}, path, metadata)


def _facts(provenance: Provenance) -> dict[str, str]:
    return {
        "base_model": provenance.base_model,
        "base_revision": provenance.revision or "",
        "base_fingerprint": provenance.base_fingerprint,
        "method": provenance.method,
        "train_method": provenance.train_method,
        "concepts": json.dumps(provenance.concepts, ensure_ascii=False),
        "versions": json.dumps(provenance.versions),
    }


def _save_whole(weights: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial, metadata)
    os.replace(partial, path)


@torch.no_grad()
def load_partial(denoiser: nn.Module, path: str | Path) -> dict[str, str]:
    """Loads a file of [`save_partial`] into the base model's denoiser; nothing changes unless all of it fits.

    Args:
        denoiser (`nn.Module`): The base model's.
        path (`str` or `Path`): The file.

    Returns:
        `dict[str, str]`: The file's metadata.

    Raises:
        `ValueError`: If the file does not exist, is no such file, was made for another base model, or holds a name or
            shape that the denoiser does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"partial weights {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"partial weights {path}: not a safetensors file ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"partial weights {path}: format '{metadata.get('format')}'; this reads {_FORMAT}")
    if not weights:
        raise ValueError(f"partial weights {path}: holds no weights")
    if metadata["base_fingerprint"] != (own := fingerprint(denoiser)):
        raise ValueError(
            f"partial weights {path}: made for {metadata['base_model']} with fingerprint "
            f"{metadata['base_fingerprint']}, this model's is {own}"
        )
    parameters = dict(denoiser.named_parameters())
    for name, value in weights.items():
        if name not in parameters:
            raise ValueError(f"partial weights {path}: the denoiser has no parameter {name}")
        if parameters[name].shape != value.shape:
            raise ValueError(
                f"partial weights {path}: {name} has shape {tuple(value.shape)}, "
                f"the denoiser's has {tuple(parameters[name].shape)}"
            )
    for name, value in weights.items():
        parameters[name].copy_(value)
    return metadata
