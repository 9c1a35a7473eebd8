"""What a finished training leaves in its output folder."""

from pathlib import Path

from diffusers import DiffusionPipeline

from ..families import denoiser_of
from ..formats import LORA_NAME, PARTIAL_NAME, save_lora, save_model, save_partial, written_aside
from ..provenance import Distillation, Provenance
from ..weights.lora import LoRAWeights, fused
from ..weights.trained import TrainedWeights


def save_result(
    pipeline: DiffusionPipeline,
    weights: TrainedWeights,
    provenance: Provenance,
    output_dir: str | Path,
    save: str = "full",
) -> None:
    """Writes the erased pipeline as a stock folder, its denoiser alone, or what was trained alone; and erasure.json.

    What was trained is a file of the erased weights, or a LoRA; a full pipeline, or denoiser, has the LoRA fused into
    its weights. Whole or not at all, see [`written_aside`].

    Args:
        pipeline (`DiffusionPipeline`): With the erased weights in its denoiser.
        weights (`TrainedWeights`): Of its denoiser; the student is saved.
        provenance (`Provenance`): The record.
        output_dir (`str` or `Path`): The folder, claimed by the run.
        save (`str`, defaults to `"full"`): `"full"`, the name of the denoiser, `"partial"` (of a LoRA `"lora"`), or
            `"both"`: full and partial or lora.
    """
    is_lora = isinstance(weights, LoRAWeights)
    with written_aside(output_dir, provenance) as aside:
        if save not in ("lora", "partial"):
            only_denoiser = save not in ("full", "both")
            save_model(fused(pipeline) if is_lora else pipeline, aside, only_denoiser)
        if save in ("lora", "both") and is_lora:
            save_lora(pipeline, provenance, aside / LORA_NAME)
        if save in ("partial", "both") and not is_lora:
            save_partial(weights.student, provenance, aside / PARTIAL_NAME)


def save_student(
    pipeline: DiffusionPipeline, record: Distillation, output_dir: str | Path, save: str = "full"
) -> None:
    """Writes a student's pipeline as a stock folder, or its denoiser alone, with its record. Whole or not at all."""
    whole = fused(pipeline) if getattr(denoiser_of(pipeline), "peft_config", None) else pipeline
    with written_aside(output_dir, record) as aside:
        save_model(whole, aside, only_denoiser=save != "full")
