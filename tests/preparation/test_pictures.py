"""Pictures become upright RGB JPEGs without metadata. tests/test_images.py has every mode and file format."""

import io
from importlib import import_module

import pytest
from PIL import Image

from diffusers_safe.preparation import Filters
from diffusers_safe.preparation.filters import Dropped
from diffusers_safe.preparation.pictures import read_picture
from picture_files import encoded
from prepared_data import picture


@pytest.mark.parametrize(
    "image, options, changes",
    [
        (Image.new("RGB", (20, 10)), {}, ()),
        (Image.new("L", (20, 10), 90), {}, ("L to RGB",)),
        (Image.new("RGBA", (20, 10), (0, 0, 0, 51)), {}, ("RGBA to RGB", "laid on white")),
        (Image.new("RGB", (20, 10)), {"transparency": (0, 0, 0)}, ("laid on white",)),
    ],
)
def test_changes_are_listed(image, options, changes):
    made = read_picture(encoded(image, **options), Filters())
    assert made.changes == changes and made.size == (20, 10)
    assert Image.open(io.BytesIO(made.jpeg)).mode == "RGB"


def test_pictures_are_rotated_upright_and_lose_their_metadata():
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees, clockwise
    exif[0x010E] = "secret place"
    data = encoded(image, "JPEG", exif=exif, comment=b"secret words", quality=95)
    made = read_picture(data, Filters(min_side=20, max_aspect_ratio=2))
    upright = Image.open(io.BytesIO(made.jpeg))
    assert made.changes == ("turned upright",) and upright.size == (20, 40) == made.original_size
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200
    assert not upright.getexif() and b"secret" in data and b"secret" not in made.jpeg


@pytest.mark.parametrize("size, resized", [((100, 50), (40, 20)), ((33, 77), (20, 47)), ((20, 90), (20, 90))])
def test_resize_shrinks_the_shorter_side(size, resized):
    made = read_picture(encoded(picture(0, size)), Filters(), resize=20)
    assert made.size == resized == Image.open(io.BytesIO(made.jpeg)).size and made.original_size == size
    assert made.changes == (("shrunk",) if size != resized else ())


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encoded(picture(0))[:80], "broken picture"),
        (encoded(picture(0, (300, 300)), "JPEG")[:-300], "broken picture"),
        (encoded(picture(0, (40, 26))), "too many pixels"),
        (encoded(picture(0, (90, 90))), "too many pixels"),
    ],
)
def test_unusable_pictures_are_dropped(monkeypatch, data, reason):
    if reason == "too many pixels":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Dropped, match=f"^{reason}$"):
        read_picture(data, Filters())


def test_any_exception_of_a_decoder_means_a_broken_picture(monkeypatch):
    def fail(image):
        raise RuntimeError("a bug in a decoder")

    monkeypatch.setattr(import_module("diffusers_safe.preparation.pictures"), "to_rgb", fail)
    with pytest.raises(Dropped, match="broken picture"):
        read_picture(encoded(picture(0)), Filters())
