"""The one way from any picture to 8-bit RGB. Every part of the package that opens a picture uses it.

* The full range maps to the full range: 16-bit values are divided by 257. Files with 32 bits do not say how bright
  white is, so it is the smallest of the usual values (1, 255, 65,535, 2^31 - 1) that no pixel exceeds; below 0 is
  black.
* Transparency is laid on white.
* A picture is turned upright as its EXIF tag says; of an animation the first frame is used.
* Colour profiles are not applied.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


INTEGER_WHITES, FLOAT_WHITES = (255, 65_535, 2**31 - 1), (1, 255, 65_535)
# What PIL raises at files that are cut, damaged, missing, or no pictures.
_UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, ArithmeticError, struct.error,
               Image.DecompressionBombError)  # fmt: skip


class UnreadableImage(ValueError):
    """A picture that cannot be decoded; its text says why, in one line."""


def open_rgb(source: str | PathLike | bytes) -> Image.Image:
    """Opens a picture as 8-bit RGB.

    Args:
        source (`str`, `PathLike` or `bytes`): A file, or its content.

    Raises:
        [`UnreadableImage`]: If it cannot be decoded; the message names the file.
    """
    in_memory = isinstance(source, bytes)
    with reading_image("" if in_memory else f"{source} cannot be read as an image"):
        with Image.open(io.BytesIO(source) if in_memory else source) as image:
            return to_rgb(image)


@contextmanager
def reading_image(message: str = "") -> Iterator[None]:
    """Turns whatever a decoder raises into an [`UnreadableImage`]: `message` with the reason in parentheses, or the
    reason alone."""
    try:
        yield
    except UnidentifiedImageError:  # its own text names an address in memory
        reason = "it is not a picture of a known kind"
    except _UNREADABLE as error:
        lines = (getattr(error, "strerror", None) or str(error)).strip().split("\n")
        reason = lines[0][:200] or type(error).__name__
    else:
        return
    raise UnreadableImage(f"{message} ({reason})" if message else reason)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as upright 8-bit RGB without metadata, as described at the top of this module.

    Raises:
        `ValueError`: If PIL cannot convert its mode, or a value is not finite.
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
    """Whether the EXIF tag says that a picture is to be rotated or mirrored."""
    return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)


def to_8_bits(image: Image.Image) -> Image.Image:
    """A picture with one wide channel (16 or 32 bits, integer or floating point) as 8-bit gray; any other as it is."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    if image.mode.startswith("I;16"):
        white = 65_535
    else:
        most = values.max(initial=0)
        white = next(
            (white for white in (FLOAT_WHITES if image.mode == "F" else INTEGER_WHITES) if most <= white), most
        )
    gray = (255 * values.clip(0, white) / white).round().astype(np.uint8)
    transparent = image.info.get("transparency")  # the value of the pixels that are not there
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray)
