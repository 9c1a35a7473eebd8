"""Pipelines with Safe Latent Diffusion."""

from .output import StableDiffusionSafePipelineOutput
from .safe_latent_diffusion import disable_safe_latent_diffusion, enable_safe_latent_diffusion
from .stable_diffusion import (
    StableDiffusionImg2ImgPipelineSafe,
    StableDiffusionInpaintPipelineSafe,
    StableDiffusionPipelineSafe,
)
from .stable_diffusion_xl import StableDiffusionXLPipelineSafe


__all__ = [
    "StableDiffusionImg2ImgPipelineSafe",
    "StableDiffusionInpaintPipelineSafe",
    "StableDiffusionPipelineSafe",
    "StableDiffusionSafePipelineOutput",
    "StableDiffusionXLPipelineSafe",
    "disable_safe_latent_diffusion",
    "enable_safe_latent_diffusion",
]
