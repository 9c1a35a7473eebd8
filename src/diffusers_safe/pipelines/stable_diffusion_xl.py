"""Stable Diffusion XL with Safe Latent Diffusion."""

from collections.abc import Callable
from typing import Any

from diffusers import StableDiffusionXLPipeline

from .output import StableDiffusionSafePipelineOutput
from .repository import SafePipelineMixin
from .stock import with_stock_signatures


@with_stock_signatures
class StableDiffusionXLPipelineSafe(SafePipelineMixin, StableDiffusionXLPipeline):
    """[`~diffusers.StableDiffusionXLPipeline`] with Safe Latent Diffusion, see [`StableDiffusionPipelineSafe`].

    SLD's presets were found for Stable Diffusion 1.x; the paper does not measure them on SDXL.
    """

    _card_tags = ("text-to-image", "stable-diffusion-xl")

    def _generate(self, call: Callable, arguments: dict[str, Any]) -> StableDiffusionSafePipelineOutput | tuple:
        return_dict = arguments["return_dict"]
        (images,), applied = self._call_with_concept(call, {**arguments, "return_dict": False})
        output = StableDiffusionSafePipelineOutput(images, None, applied, None)
        return output if return_dict else (images, None, applied, None)
