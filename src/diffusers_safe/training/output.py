"""What a finished erasure leaves in its output folder."""

import os
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..formats import PARTIAL_NAME, save_partial
from ..provenance import Provenance


def save_result(
    pipeline: DiffusionPipeline,
    erased_weights: dict[str, torch.Tensor],
    provenance: Provenance,
    output_dir: str | Path,
    save: str = "full",
) -> None:
    """Writes the erased pipeline as a stock diffusers folder, the erased weights alone, or both, and erasure.json.

    Everything is written aside first and moved into place when it is whole.

    Args:
        pipeline (`DiffusionPipeline`): With the erased weights in its denoiser.
        erased_weights (`dict[str, torch.Tensor]`): The trained parameters, by name.
        save (`str`, defaults to `"full"`): `"full"`, `"partial"` or `"both"`.
    """
    output_dir = Path(output_dir)
    aside = output_dir / ".result.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if save in ("full", "both"):
        pipeline.save_pretrained(aside, safe_serialization=True)
    if save in ("partial", "both"):
        save_partial(erased_weights, provenance, aside / PARTIAL_NAME)
    provenance.save(aside)
    for item in aside.iterdir():
        target = output_dir / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    aside.rmdir()
