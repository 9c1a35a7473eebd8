"""The mean difference of pixels: the simplest distance, without a network."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .base import Metric, Quantity
from .resizing import check_sizes


class PixelDistance(Metric):
    """[`pixel_distance`] to the original model's image of the same prompt and seed."""

    name = "pixel_distance"
    compares = True
    same_size = True
    quantities = {"pixel_distance": Quantity("pixel distance", better="lower")}

    def identity(self) -> dict:
        return {"metric": self.name}

    def score(
        self, images: Sequence[Image.Image], rows: Sequence[dict], originals: Sequence[Image.Image]
    ) -> list[dict]:
        for row, image, original in zip(rows, images, originals):
            check_sizes(self.name, row["id"], image.size, original.size)
        pairs = [(np.asarray(original)[None], np.asarray(image)[None]) for original, image in zip(originals, images)]
        return [{"distance": float(pixel_distance(*pair)[0])} for pair in pairs]

    def values(self, row: dict, score: dict) -> dict[str, float]:
        return {"pixel_distance": score["distance"]}


def pixel_distance(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the pixels of image pairs, usually of the same prompts and seeds.

    Args:
        before (`np.ndarray`): `(N, H, W, 3)`, `uint8`.
        after (`np.ndarray`): The same shape and dtype; image `i` is compared with image `i` of `before`.

    Returns:
        `np.ndarray`: `(N,)`, `float64`: 0 for equal images, 1 for black against white.

    Raises:
        `ValueError`: If shapes differ, or an array is not a stack of `uint8` images.
    """
    for name, images in {"before": before, "after": after}.items():
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"{name} is {images.dtype} of shape {images.shape}; it must be uint8, (N, H, W, 3)")
    if before.shape != after.shape:
        raise ValueError(f"before has shape {before.shape}, after has {after.shape}; they must be the same")
    return np.array([np.abs(a.astype(np.int16) - b).mean() / 255 for a, b in zip(before, after)])
