"""Decoding of image files and preprocessing to the tensors that the autoencoder takes."""

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ...images import UnreadableImage, reading_image, to_rgb
from ...values import choose


INTERPOLATION_MODES = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
MAX_ASPECT_RATIO = 32  # resizing the shorter side of narrower images would fill the memory


def decode_image(value: Any) -> Image.Image:
    """Decodes an image as `datasets.Image(decode=False)` stores it (`path` or `bytes`) with [`to_rgb`].

    Raises:
        `UnreadableImage`: If it cannot be decoded for any reason.
    """
    if value is None:
        raise UnreadableImage("the image is missing")
    with reading_image():
        image = to_rgb(datasets.Image().decode_example(value))
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise UnreadableImage(f"{image.width} x {image.height} pixels are too narrow to be cropped")
    return image


@dataclass
class Picture:
    """A preprocessed image.

    Attributes:
        pixel_values (`torch.Tensor`): `(3, resolution, resolution)`, float32, in [-1, 1].
        original_size (`tuple[int, int]`): Height and width of the upright image before resizing.
        crop_top_left (`tuple[int, int]`): Offset of the crop in the resized image, before flipping.
    """

    pixel_values: torch.Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


@dataclass(frozen=True)
class Preprocessing:
    """Resizes the shorter side to `resolution`, crops a square and flips it, as diffusers' `train_text_to_image.py`.

    Args:
        resolution (`int`): Height and width of the result in pixels.
        image_interpolation_mode (`str`, defaults to `"lanczos"`): A key of `INTERPOLATION_MODES`.
        center_crop (`bool`, defaults to `False`): Whether to crop the center instead of a random square.
        random_flip (`bool`, defaults to `False`): Whether to flip an image horizontally with probability 0.5.

    Raises:
        `ValueError`: If the mode is unknown or the resolution is less than 1.
    """

    resolution: int
    image_interpolation_mode: str = "lanczos"
    center_crop: bool = False
    random_flip: bool = False

    def __post_init__(self):
        mode = choose("image_interpolation_mode", self.image_interpolation_mode, INTERPOLATION_MODES)
        object.__setattr__(self, "image_interpolation_mode", mode)
        if self.resolution < 1:
            raise ValueError(f"resolution {self.resolution}: must be at least 1")

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Picture:
        """Crops and flips. The generator samples the crop first, if it is random, and then the flip."""
        picture = self.crop(image, generator)
        if self.draw_flip(generator):
            picture.pixel_values = picture.pixel_values.flip(-1)
        return picture

    def crop(self, image: Image.Image, generator: torch.Generator) -> Picture:
        """Resizes and crops without flipping."""
        size = self.resolution
        width, height = self._resized(image)
        top, left = (self._offset(side - size, generator) for side in (height, width))
        resized = image.resize((width, height), INTERPOLATION_MODES[self.image_interpolation_mode])
        square = resized.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
        return Picture(pixels.contiguous(), (image.height, image.width), (top, left))

    def crops_at_random(self, image: Image.Image) -> bool:
        """Whether the crop of this image depends on the generator."""
        return not self.center_crop and max(self._resized(image)) > self.resolution

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """Width and height of the resized image, rounded down as in torchvision."""
        return image.width * self.resolution // min(image.size), image.height * self.resolution // min(image.size)

    def _offset(self, room: int, generator: torch.Generator) -> int:
        if self.center_crop:
            return round(room / 2)
        return int(torch.randint(room + 1, (), generator=generator)) if room else 0

    def draw_flip(self, generator: torch.Generator) -> bool:
        """Samples whether to flip an image."""
        return self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
