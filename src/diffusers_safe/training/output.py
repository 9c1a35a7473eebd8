"""What a finished erasure leaves in its output folder."""

import os
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

from ..evaluation.grid import GRID_NAME
from ..formats import LORA_NAME, PARTIAL_NAME, save_lora, save_partial
from ..lora import LoRAWeights, fused
from ..provenance import FILE_NAME, Provenance
from ..weights import TrainedWeights


def save_result(
    pipeline: DiffusionPipeline,
    weights: TrainedWeights,
    provenance: Provenance,
    output_dir: str | Path,
    save: str = "full",
) -> None:
    """Writes the erased pipeline as a stock diffusers folder, what was trained alone, or both, and erasure.json.

    What was trained is a file of the erased weights, or a LoRA; a full pipeline has the LoRA fused into its weights.

    Everything is written aside first and moved into place when it is whole. What an earlier run left goes first, and
    `model_index.json` and `erasure.json` come last: a folder that has them is complete.

    Args:
        pipeline (`DiffusionPipeline`): With the erased weights in its denoiser.
        weights (`TrainedWeights`): Of its denoiser; the student is what is saved.
        save (`str`, defaults to `"full"`): `"full"`, `"both"`, or, alone, `"partial"` (of a LoRA: `"lora"`).
    """
    output_dir = Path(output_dir)
    aside = output_dir / ".result.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    is_lora = isinstance(weights, LoRAWeights)
    if save in ("full", "both"):
        (fused(pipeline) if is_lora else pipeline).save_pretrained(aside, safe_serialization=True)
    if save in ("lora", "both") and is_lora:
        save_lora(pipeline, provenance, aside / LORA_NAME)
    if save in ("partial", "both") and not is_lora:
        save_partial(weights.student, provenance, aside / PARTIAL_NAME)
    provenance.save(aside)
    for name in (FILE_NAME, "model_index.json", PARTIAL_NAME, LORA_NAME, GRID_NAME):
        (output_dir / name).unlink(missing_ok=True)
    for item in sorted(aside.iterdir(), key=lambda item: (item.suffix == ".json", item.name)):
        target = output_dir / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    aside.rmdir()
