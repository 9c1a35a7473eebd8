"""Files that hold only the erased weights: partial safetensors with metadata, read strictly."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

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
    path = Path(path)
    metadata = {
        "format": _FORMAT,
        "base_model": provenance.base_model,
        "base_revision": provenance.revision or "",
        "base_fingerprint": provenance.base_fingerprint,
        "method": provenance.method,
        "train_method": provenance.train_method,
        "concepts": json.dumps(provenance.concepts, ensure_ascii=False),
        "versions": json.dumps(provenance.versions),
    }
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
