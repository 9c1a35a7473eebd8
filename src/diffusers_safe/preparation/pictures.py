"""From the bytes of any picture to an upright RGB JPEG without metadata."""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from ..images import is_turned, to_rgb
from .filters import SIZE_RULES, Dropped, Filters, reason_to_drop


# Those of the web. Pillow reads more, some with the help of other programs: not from strangers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
LONGEST_SIDE = 65_500  # in pixels, of a JPEG that Pillow writes


@dataclass(frozen=True)
class Picture:
    """A picture ready for a shard.

    Attributes:
        jpeg (`bytes`): Upright, RGB, without metadata.
        sha256 (`str`): Of the bytes it was read from.
        size (`tuple[int, int]`): Width and height in pixels.
        original_size (`tuple[int, int]`): Before it was shrunk.
        changes (`tuple[str, ...]`): What was done to it.
    """

    jpeg: bytes
    sha256: str
    size: tuple[int, int]
    original_size: tuple[int, int]
    changes: tuple[str, ...]


def read_picture(data: bytes, filters: Filters, resize: int | None = None, quality: int = 95) -> Picture:
    """Decodes, checks and encodes a picture; of an animation the first frame.

    Args:
        data (`bytes`): A file.
        filters ([`Filters`]): The least side and the aspect ratio count here.
        resize (`int`, *optional*): Pixels of the shorter side; larger pictures are shrunk to it.
        quality (`int`, defaults to 95): Of the JPEG, 1 to 95.

    Raises:
        [`Dropped`]: If it is no picture, cannot be decoded to the end, has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (89 million), or a filter says so.
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
    except Exception:  # a broken file can raise anything in a decoder
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
    """What [`to_rgb`] does to a picture."""
    found = {
        f"{image.mode} to RGB": image.mode != "RGB",
        "laid on white": image.has_transparency_data,
        "turned upright": is_turned(image),
    }
    return [change for change, happens in found.items() if happens]
