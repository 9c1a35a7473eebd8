"""Files that hold only what was erased: safetensors whose metadata says what from which model."""

import json
import os
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA_NAME
from safetensors.torch import save_file

from ..provenance import Provenance


__all__ = ["LORA_NAME", "PARTIAL_FORMAT", "PARTIAL_NAME", "facts", "known_facts", "save_partial", "save_whole"]
PARTIAL_NAME = "erased_weights.safetensors"
PARTIAL_FORMAT = "diffusers-safe-partial-1"


def save_partial(weights: dict[str, torch.Tensor], provenance: Provenance, path: str | Path) -> None:
    """Writes selected weights of a denoiser, with the facts of the erasure in the file's metadata.

    Args:
        weights (`dict[str, torch.Tensor]`): By the names of the denoiser's parameters.
        provenance (`Provenance`): Names the base model; its fingerprint is checked on loading.
        path (`str` or `Path`): The `.safetensors` file; it is whole or absent.
    """
    save_whole(weights, path, {"format": PARTIAL_FORMAT, **facts(provenance)})


def facts(provenance: Provenance) -> dict[str, str]:
    """A provenance as metadata of a safetensors file: a file gets separated from its erasure.json."""
    return {
        "base_model": provenance.base_model or "",
        "base_revision": provenance.revision or "",
        "base_fingerprint": provenance.base_fingerprint or "",
        "method": provenance.method,
        "train_method": provenance.train_method,
        "concepts": json.dumps(provenance.concepts, ensure_ascii=False),
        "arguments": json.dumps(provenance.arguments, ensure_ascii=False),
        "versions": json.dumps(provenance.versions),
        "created": provenance.created,
        "export": json.dumps(provenance.export),
    }


def known_facts(metadata: dict[str, str]) -> dict:
    """What [`facts`] wrote, or an earlier version of it, as fields of [`Provenance`]; only what is there.

    Raises:
        `ValueError`: If a value is not what [`facts`] writes.
    """
    known = {name: metadata[name] for name in ("base_model", "base_fingerprint", "method", "train_method", "created")
             if metadata.get(name)}  # fmt: skip
    if metadata.get("base_revision"):
        known["revision"] = metadata["base_revision"]
    for name, kind in (("concepts", list), ("arguments", dict), ("versions", dict), ("export", dict | None)):
        if name in metadata:
            try:
                known[name] = json.loads(metadata[name])
            except json.JSONDecodeError:
                known[name] = None
            if not isinstance(known[name], kind):
                raise ValueError(f"metadata {name} '{metadata[name][:60]}': must be JSON of another kind")
    return known


def save_whole(weights: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file that is either whole or absent."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial, metadata)
    os.replace(partial, path)
