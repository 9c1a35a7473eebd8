"""Stable Diffusion XL with Safe Latent Diffusion."""

from diffusers import StableDiffusionXLPipeline

from .repository import SafePipelineMixin
from .stock import with_stock_signatures


@with_stock_signatures
class StableDiffusionXLPipelineSafe(SafePipelineMixin, StableDiffusionXLPipeline):
    """[`~diffusers.StableDiffusionXLPipeline`] with Safe Latent Diffusion, see [`StableDiffusionPipelineSafe`].

    SLD's presets were found for Stable Diffusion 1.x; the paper does not measure them on SDXL.
    """

    _card_tags = ("text-to-image", "stable-diffusion-xl")
