"""What differs between model families, behind one small interface."""

from .base import Backbone, Conditioning, check_model, load_pipeline, make_backbone
from .stable_diffusion import StableDiffusionBackbone


__all__ = [
    "Backbone",
    "Conditioning",
    "StableDiffusionBackbone",
    "check_model",
    "load_pipeline",
    "make_backbone",
]
