"""Files with the changed weights only; their metadata names the base model and the erased concepts."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA_NAME
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from ..files import save_tensors
from ..provenance import Provenance
from ..weights.lora import ADAPTER_NAME, adapted_component


__all__ = ["CHECKPOINT_NAME", "KOHYA_NAME", "LORA_NAME", "PARTIAL_FORMAT", "PARTIAL_NAME", "copy_with_facts", "facts",
           "known_facts", "save_lora", "save_partial", "save_whole"]  # fmt: skip
KOHYA_NAME = "kohya_lora.safetensors"
CHECKPOINT_NAME = "checkpoint.safetensors"
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
            metadata = {**file.metadata(), **facts(provenance)}
            save_whole({name: file.get_tensor(name) for name in file.keys()}, path, metadata)


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
            except (json.JSONDecodeError, RecursionError):
                known[name] = None
            if not isinstance(known[name], kind):
                raise ValueError(f"metadata {name} '{metadata[name][:60]}': must be JSON of another kind")
    return known


def copy_with_facts(source: str | Path, target: str | Path, provenance: Provenance) -> bool:
    """Copies a file of erased weights whose [`facts`] become those of another provenance.

    Only the header is written anew, the tensors are copied byte for byte: safetensors orders metadata differently each
    time, and the same file must stay the same file.

    Returns:
        `bool`: Whether there was anything to change; without, there is no copy.

    Raises:
        `ValueError`: If it is no safetensors file.
    """
    try:
        with safe_open(source, framework="pt") as file:
            own = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{source}: not a safetensors file ({error})") from None
    if "base_model" not in own or facts(provenance).items() <= own.items():
        return False
    with open(source, "rb") as old:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] |= facts(provenance)
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        with open(target, "wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(old, new)
    return True


def save_whole(weights: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file that is either whole or absent."""
    save_tensors({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path, metadata)
