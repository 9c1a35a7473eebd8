"""Converts images to tensors and resizes them. Numbers made with different methods cannot be compared."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ..images import to_rgb


class SizeError(ValueError):
    """Images of different sizes, which a metric cannot compare."""

    exit_code = 2


def check_sizes(metric: str, image_id: str, size: tuple[int, int], original: tuple[int, int]) -> None:
    """
    Raises:
        [`SizeError`]: If an image and the original model's image differ in size, (width, height).
    """
    if size != original:
        raise SizeError(
            f"{metric}: image {image_id} has {size[0]} x {size[1]} pixels, the original's "
            f"{original[0]} x {original[1]}; they must be the same"
        )


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as `(3, H, W)`, `float32`, 0 to 255."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).float()


def resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> torch.Tensor:
    """Resizes with PIL, which antialiases, to (width, height); values are rounded."""
    return to_tensor(to_rgb(image).resize(size, resample))


def resized_unrounded(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> torch.Tensor:
    """The same for each channel in floating point: values are neither rounded nor clipped."""
    channels = [Image.fromarray(channel).resize(size, resample) for channel in to_tensor(image).numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))


def shorter_side(image: Image.Image, side: int) -> torch.Tensor:
    """Resizes the shorter side to `side` pixels with PIL's bilinear filter, keeping the aspect ratio."""
    width, height = (side * length // min(image.size) for length in image.size)
    return resized(image, (width, height), Image.Resampling.BILINEAR)


def interpolated(tensor: torch.Tensor, side: int, antialias: bool) -> torch.Tensor:
    """Resizes `(3, H, W)` to `(3, side, side)` with torch's bilinear filter."""
    size = (side, side)
    return functional.interpolate(tensor[None], size, mode="bilinear", align_corners=False, antialias=antialias)[0]
