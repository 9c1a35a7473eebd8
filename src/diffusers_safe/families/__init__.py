"""What differs between model families, behind one interface; `base.py` says how to add a family."""

from .base import Conditioning, ModelFamily
from .files import check_files
from .registry import (
    denoiser_names,
    denoiser_of,
    families,
    family_around,
    family_of_class,
    family_of_denoiser,
    family_of_names,
    family_of_pipeline,
    find_family,
    load_pipeline,
    make_family,
    own_pipelines,
    register_family,
)
from .stable_diffusion import StableDiffusionFamily
from .stable_diffusion_3 import StableDiffusion3Family
from .stable_diffusion_xl import StableDiffusionXLFamily
from .stored import StoredModel, stored_denoiser
from .text_encoders import TextEncoders
from .train_methods import TEXT_ENCODERS, TRAIN_METHODS, resolve_train_method


# isort: split
from .flux import FluxFamily  # last, because a file that fits several families is taken for the first one's


__all__ = [
    "TEXT_ENCODERS",
    "TRAIN_METHODS",
    "Conditioning",
    "FluxFamily",
    "ModelFamily",
    "StableDiffusion3Family",
    "StableDiffusionFamily",
    "StableDiffusionXLFamily",
    "StoredModel",
    "TextEncoders",
    "check_files",
    "denoiser_names",
    "denoiser_of",
    "families",
    "family_around",
    "family_of_class",
    "family_of_denoiser",
    "family_of_names",
    "family_of_pipeline",
    "find_family",
    "load_pipeline",
    "make_family",
    "own_pipelines",
    "register_family",
    "resolve_train_method",
    "stored_denoiser",
]
