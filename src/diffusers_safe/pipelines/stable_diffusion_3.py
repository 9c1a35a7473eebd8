"""Stable Diffusion 3 with Safe Latent Diffusion."""

from diffusers import StableDiffusion3Pipeline

from .repository import SafePipelineMixin
from .stock import with_stock_signatures


@with_stock_signatures
class StableDiffusion3PipelineSafe(SafePipelineMixin, StableDiffusion3Pipeline):
    """[`~diffusers.StableDiffusion3Pipeline`] with Safe Latent Diffusion, see [`StableDiffusionPipelineSafe`].

    It steers the predicted velocity v in place of the noise eps. At noise level sigma, the difference of two
    predictions for the same latents is

        eps_1 - eps_2 = (1 - sigma) (v_1 - v_2)

    so in eps it vanishes at high noise, where the content is decided.
    """

    _card_tags = ("text-to-image", "stable-diffusion-3")
