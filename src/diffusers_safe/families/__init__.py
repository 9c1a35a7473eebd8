"""What differs between model families, behind one small interface."""

from .base import Conditioning, ModelFamily, load_pipeline, make_family
from .stable_diffusion import StableDiffusionFamily
from .stable_diffusion_xl import StableDiffusionXLFamily
from .stored import StoredModel, stored_unet


__all__ = [
    "ModelFamily",
    "Conditioning",
    "StableDiffusionFamily",
    "StableDiffusionXLFamily",
    "StoredModel",
    "load_pipeline",
    "make_family",
    "stored_unet",
]
