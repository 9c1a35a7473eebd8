"""Converts the bytes of an image to an upright RGB JPEG without metadata."""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from ..images import is_turned, to_rgb
from .filters import SIZE_RULES, Dropped, Filters, reason_to_drop


# Pillow reads more formats, some with external programs; those are not used for untrusted files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
LONGEST_SIDE = 65_500  # in pixels, of the JPEGs that Pillow can write


@dataclass(frozen=True)
class Picture:
    """An image ready for a shard.

    Attributes:
        jpeg (`bytes`): The image: upright, RGB, without metadata.
        sha256 (`str`): Hash of the original bytes.
        size (`tuple[int, int]`): Width and height in pixels.
        original_size (`tuple[int, int]`): Width and height before resizing.
        changes (`tuple[str, ...]`): The changes that were made, such as `"L to RGB"` or `"shrunk"`.
    """

    jpeg: bytes
    sha256: str
    size: tuple[int, int]
    original_size: tuple[int, int]
    changes: tuple[str, ...]


def read_picture(data: bytes, filters: Filters, resize: int | None = None, quality: int = 95) -> Picture:
    """Decodes, checks and encodes an image. Of an animation, the first frame is used.

    Args:
        data (`bytes`): Content of the file.
        filters ([`Filters`]): Minimum side and aspect ratio are checked.
        resize (`int`, *optional*): Length of the shorter side in pixels, to which larger images are resized.
        quality (`int`, defaults to 95): JPEG quality, 1 to 95.

    Raises:
        [`Dropped`]: If the data is not an image, cannot be decoded completely, has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (89 million), or does not pass the filters.
    """
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Dropped("too many pixels")
        changes = _changes(image)
        rgb = to_rgb(image)
    except Dropped:
        raise
    except UnidentifiedImageError:
        raise Dropped("not a picture") from None
    except Image.DecompressionBombError:
        raise Dropped("too many pixels") from None
    except Exception:  # decoders can raise any exception for broken files
        raise Dropped("broken picture") from None
    if reason := reason_to_drop(SIZE_RULES, rgb.size, filters):
        raise Dropped(reason)
    shrunk = rgb
    if resize is not None and min(rgb.size) > resize:
        scale = resize / min(rgb.size)
        shrunk = rgb.resize([max(resize, round(side * scale)) for side in rgb.size], Image.Resampling.LANCZOS)
        changes.append("shrunk")
    if max(shrunk.size) > LONGEST_SIDE:
        raise Dropped("too long for a JPEG")
    jpeg = io.BytesIO()
    shrunk.save(jpeg, "JPEG", quality=quality)
    return Picture(jpeg.getvalue(), hashlib.sha256(data).hexdigest(), shrunk.size, rgb.size, tuple(changes))


def _changes(image: Image.Image) -> list[str]:
    """The changes that [`to_rgb`] makes to an image."""
    found = {
        f"{image.mode} to RGB": image.mode != "RGB",
        "laid on white": image.has_transparency_data,
        "turned upright": is_turned(image),
    }
    return [change for change, happens in found.items() if happens]
