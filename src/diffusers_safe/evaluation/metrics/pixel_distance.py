"""How far images moved: the simplest distance, without a network."""

import numpy as np


def pixel_distance(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the pixels of image pairs, usually made from the same prompts and seeds.

    Args:
        before (`np.ndarray`): `(N, H, W, 3)`, `uint8`.
        after (`np.ndarray`): The same shape and type; row `i` belongs to row `i` of `before`.

    Returns:
        `np.ndarray`: `(N,)`, `float64`: 0 for equal images, 1 for black against white.

    Raises:
        `ValueError`: If shapes differ, or an array is no stack of `uint8` images.
    """
    for name, images in {"before": before, "after": after}.items():
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"{name} is {images.dtype} of shape {images.shape}; it must be uint8, (N, H, W, 3)")
    if before.shape != after.shape:
        raise ValueError(f"before has shape {before.shape}, after has {after.shape}; they must be the same")
    return np.array([np.abs(a.astype(np.int16) - b).mean() / 255 for a, b in zip(before, after)])
