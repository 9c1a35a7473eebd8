"""What a finished erasure leaves in its output folder."""

import os
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..evaluation.grid import GRID_NAME
from ..formats import PARTIAL_NAME, save_partial
from ..provenance import FILE_NAME, Provenance


def save_result(
    pipeline: DiffusionPipeline,
    erased_weights: dict[str, torch.Tensor],
    provenance: Provenance,
    output_dir: str | Path,
    save: str = "full",
) -> None:
    """Writes the erased pipeline as a stock diffusers folder, the erased weights alone, or both, and erasure.json.

    Everything is written aside first and moved into place when it is whole. What an earlier run left goes first, and
    `model_index.json` and `erasure.json` come last: a folder that has them is complete.

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
    for name in (FILE_NAME, "model_index.json", PARTIAL_NAME, GRID_NAME):
        (output_dir / name).unlink(missing_ok=True)
    for item in sorted(aside.iterdir(), key=lambda item: (item.suffix == ".json", item.name)):
        target = output_dir / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    aside.rmdir()
