"""Pipelines with Safe Latent Diffusion, and pipelines with erased weights."""

from .erased import (
    ErasedFluxPipeline,
    ErasedStableDiffusion3Pipeline,
    ErasedStableDiffusionPipeline,
    ErasedStableDiffusionXLPipeline,
)
from .output import StableDiffusionSafePipelineOutput
from .safe_latent_diffusion import disable_safe_latent_diffusion, enable_safe_latent_diffusion
from .stable_diffusion import (
    StableDiffusionImg2ImgPipelineSafe,
    StableDiffusionInpaintPipelineSafe,
    StableDiffusionPipelineSafe,
)
from .stable_diffusion_3 import StableDiffusion3PipelineSafe
from .stable_diffusion_xl import StableDiffusionXLPipelineSafe


__all__ = [
    "ErasedFluxPipeline",
    "ErasedStableDiffusion3Pipeline",
    "ErasedStableDiffusionPipeline",
    "ErasedStableDiffusionXLPipeline",
    "StableDiffusion3PipelineSafe",
    "StableDiffusionImg2ImgPipelineSafe",
    "StableDiffusionInpaintPipelineSafe",
    "StableDiffusionPipelineSafe",
    "StableDiffusionSafePipelineOutput",
    "StableDiffusionXLPipelineSafe",
    "disable_safe_latent_diffusion",
    "enable_safe_latent_diffusion",
]
