"""What differs between model families, behind one small interface."""

from .base import Backbone, Conditioning, check_model, load_pipeline, make_backbone
from .stable_diffusion import StableDiffusionBackbone
from .stable_diffusion_xl import StableDiffusionXLBackbone


__all__ = [
    "Backbone",
    "Conditioning",
    "StableDiffusionBackbone",
    "StableDiffusionXLBackbone",
    "check_model",
    "load_pipeline",
    "make_backbone",
]
