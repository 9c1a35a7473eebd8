"""The training data of distillation: captioned images from any source, encoded during training or from a cache."""

from .dataset import CaptionedImages
from .images import INTERPOLATION_MODES, Preprocessing
from .latent_cache import LatentCache
from .latents import CachedLatents, EncodedLatents, LatentBatch, LatentSource
from .loading import open_dataset
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
