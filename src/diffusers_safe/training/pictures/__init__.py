"""The data of distillation: captioned pictures of any source, as latents and text states, live or from a cache."""

from .dataset import CaptionedImages, open_dataset
from .images import INTERPOLATION_MODES, Preprocessing
from .latent_cache import LatentCache
from .latents import CachedLatents, EncodedLatents, LatentBatch, LatentSource
from .sources import PictureBatch, PictureSource, Skipped, make_pictures


__all__ = [
    "INTERPOLATION_MODES",
    "CachedLatents",
    "CaptionedImages",
    "EncodedLatents",
    "LatentBatch",
    "LatentCache",
    "LatentSource",
    "PictureBatch",
    "PictureSource",
    "Preprocessing",
    "Skipped",
    "make_pictures",
    "open_dataset",
]
