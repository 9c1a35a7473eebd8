"""What a finished erasure leaves in its output folder."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..formats import PARTIAL_NAME, UNET_FOLDER, rewrite_index, save_partial, stock_class_name, written_aside
from ..provenance import Provenance


def save_result(
    pipeline: DiffusionPipeline,
    erased_weights: dict[str, torch.Tensor],
    provenance: Provenance,
    output_dir: str | Path,
    save: str = "full",
) -> None:
    """Writes the erased pipeline as a stock diffusers folder, the erased weights alone, both, or the UNet alone; and
    erasure.json. Whole or not at all, see [`written_aside`].

    Args:
        pipeline (`DiffusionPipeline`): With the erased weights in its denoiser.
        erased_weights (`dict[str, torch.Tensor]`): The trained parameters, by name.
        save (`str`, defaults to `"full"`): `"full"`, `"partial"`, `"both"` or `"unet"`.
    """
    with written_aside(output_dir) as aside:
        if save in ("full", "both"):
            pipeline.save_pretrained(aside, safe_serialization=True)
            rewrite_index(aside, stock_class_name(pipeline))
        if save in ("partial", "both"):
            save_partial(erased_weights, provenance, aside / PARTIAL_NAME)
        if save == "unet":
            pipeline.unet.save_pretrained(aside / UNET_FOLDER, safe_serialization=True)
        provenance.save(aside)
