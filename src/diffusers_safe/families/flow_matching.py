"""What families of transformers with flow matching share: Stable Diffusion 3 and FLUX."""

from typing import Any

from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from .base import ModelFamily


PATCH_SIZE = 2  # the number of patches decides how much a schedule is shifted


class FlowMatchingFamily(ModelFamily):
    """A transformer that reads the tokens of prompts through one layer, and their pooled state through another."""

    denoiser_name = "transformer"
    kohya_prefix = "lora_transformer_"
    pooled_name = "pooled_projections"

    @classmethod
    def text_projections(cls, denoiser: nn.Module) -> list[str]:
        return ["context_embedder.weight"]

    @classmethod
    def pooled_projection(cls, denoiser: nn.Module) -> str | None:
        return "time_text_embed.text_embedder.linear_1.weight"


def dynamic_shift(scheduler: dict[str, Any], latent_shape: tuple[int, int, int], max_shift: float) -> float:
    """The `mu` that a pipeline passes to its scheduler for images of this size.

    Args:
        scheduler (`dict`): The scheduler's config.
        latent_shape (`tuple[int, int, int]`): Channels, height and width.
        max_shift (`float`): The pipeline's default, which need not be the scheduler's.
    """
    _, height, width = latent_shape
    return calculate_shift(
        (height // PATCH_SIZE) * (width // PATCH_SIZE),
        scheduler.get("base_image_seq_len", 256),
        scheduler.get("max_image_seq_len", 4096),
        scheduler.get("base_shift", 0.5),
        scheduler.get("max_shift", max_shift),
    )
