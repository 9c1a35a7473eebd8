"""What differs between model families, behind one small interface."""

from .base import Backbone, Conditioning, load_pipeline, make_backbone
from .stable_diffusion import StableDiffusionBackbone
from .stable_diffusion_xl import StableDiffusionXLBackbone
from .stored import StoredModel, stored_unet


__all__ = [
    "Backbone",
    "Conditioning",
    "StableDiffusionBackbone",
    "StableDiffusionXLBackbone",
    "StoredModel",
    "load_pipeline",
    "make_backbone",
    "stored_unet",
]
