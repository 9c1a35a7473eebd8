"""Converts any image to 8-bit RGB. All parts of the package that open images use this module.

* The full range maps to the full range: 16-bit values are divided by 257. Files with 32 bits do not define which value
  is white. White is taken to be the smallest of the usual values (1, 255, 65,535, 2^31 - 1) that no pixel exceeds.
  Negative values become black.
* Transparent pixels become white.
* Images are rotated as their EXIF tag says; of an animation the first frame is used.
* Color profiles are not applied.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


INTEGER_WHITES, FLOAT_WHITES = (255, 65_535, 2**31 - 1), (1, 255, 65_535)
# Exceptions of PIL for files that are truncated, damaged, missing or not images.
_UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, ArithmeticError, struct.error,
               Image.DecompressionBombError)  # fmt: skip


class UnreadableImage(ValueError):
    """Raised if an image cannot be decoded. The message is one line."""


def open_rgb(source: str | PathLike | bytes) -> Image.Image:
    """Opens an image as 8-bit RGB.

    Args:
        source (`str`, `PathLike` or `bytes`): A file, or its content.

    Raises:
        [`UnreadableImage`]: If the image cannot be decoded; the message names the file.
    """
    in_memory = isinstance(source, bytes)
    with reading_image("" if in_memory else f"{source} cannot be read as an image"):
        with Image.open(io.BytesIO(source) if in_memory else source) as image:
            return to_rgb(image)


@contextmanager
def reading_image(message: str = "") -> Iterator[None]:
    """Converts any exception of a decoder to [`UnreadableImage`] with the text `"message (reason)"`, or the reason if
    there is no message."""
    try:
        yield
    except UnidentifiedImageError:  # its message contains a memory address
        reason = "it is not an image of a known kind"
    except _UNREADABLE as error:
        lines = (getattr(error, "strerror", None) or str(error)).strip().split("\n")
        reason = lines[0][:200] or type(error).__name__
    else:
        return
    raise UnreadableImage(f"{message} ({reason})" if message else reason)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to upright 8-bit RGB without metadata, as described at the top of this module.

    Raises:
        `ValueError`: If PIL cannot convert the mode, or a value is not finite.
    """
    if is_turned(image):
        image = ImageOps.exif_transpose(image)
    image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info.clear()
    return image


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF tag of an image asks for a rotation or a flip."""
    return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Converts an image with one 16-bit or 32-bit channel to 8-bit gray; returns other images unchanged."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it contains values that are not finite")
    if image.mode.startswith("I;16"):
        white = 65_535
    else:
        most = values.max(initial=0)
        white = next(
            (white for white in (FLOAT_WHITES if image.mode == "F" else INTEGER_WHITES) if most <= white), most
        )
    gray = (255 * values.clip(0, white) / white).round().astype(np.uint8)
    transparent = image.info.get("transparency")  # the value of transparent pixels
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray)
