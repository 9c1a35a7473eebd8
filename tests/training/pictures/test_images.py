"""Pictures become the same tensors as with PIL step by step; unreadable files raise UnreadableImage."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_safe.training.pictures.images import INTERPOLATION_MODES, Preprocessing, UnreadableImage, decode_image
from picture_files import encoded


SIZES = [(64, 64), (100, 64), (64, 99), (37, 50), (20, 300)]


def picture(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


def by_hand(image, resolution, mode, top_left):
    """The whole picture resized, then cropped."""
    short, (top, left) = min(image.size), top_left
    size = tuple(int(resolution * side / short) for side in image.size)
    resized = image.resize(size, INTERPOLATION_MODES[mode])
    square = resized.crop((left, top, left + resolution, top + resolution))
    return torch.tensor(np.asarray(square).astype(np.float32)).permute(2, 0, 1) / 255 * 2 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", INTERPOLATION_MODES)
@pytest.mark.parametrize("center_crop", [True, False])
def test_crop_is_that_of_the_resized_picture(size, mode, center_crop):
    image = picture(size)
    made = Preprocessing(32, mode, center_crop)(image, torch.Generator().manual_seed(1))
    expected = by_hand(image, 32, mode, made.crop_top_left)
    assert made.pixel_values.shape == (3, 32, 32) and made.pixel_values.dtype == torch.float32
    torch.testing.assert_close(made.pixel_values, expected, atol=1e-6, rtol=0)
    assert made.original_size == (size[1], size[0])


def test_center_crop_leaves_the_same_on_both_sides():
    made = Preprocessing(32, center_crop=True)(picture((100, 64)), torch.Generator())
    assert made.crop_top_left == (0, 9)  # 32 of 50


def test_random_crops_reach_both_ends():
    image, generator = picture((40, 32)), torch.Generator().manual_seed(0)
    lefts = {Preprocessing(32)(image, generator).crop_top_left for _ in range(100)}
    assert lefts == {(0, left) for left in range(9)}


def test_half_of_the_pictures_are_flipped():
    image, generator = picture((32, 32)), torch.Generator().manual_seed(0)
    plain = Preprocessing(32)(image, generator).pixel_values
    flipped = 0
    for _ in range(100):
        made = Preprocessing(32, random_flip=True)(image, generator).pixel_values
        assert torch.equal(made, plain) or torch.equal(made, plain.flip(-1))
        flipped += torch.equal(made, plain.flip(-1))
    assert 35 < flipped < 65


NO_PICTURES = {
    "nothing": b"",
    "text": b"no picture",
    "half a PNG": encoded(picture((40, 40)))[:-100],
    "half a JPEG": encoded(picture((40, 40)), "JPEG")[:300],
    "a ribbon": encoded(picture((4, 200))),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_unreadable_files_raise_an_error_of_one_line(name):
    with pytest.raises(UnreadableImage) as error:
        decode_image({"bytes": NO_PICTURES[name], "path": None})
    assert str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [{"bytes": None, "path": "no/such.png"}, {"bytes": None, "path": None}, None])
def test_missing_pictures_are_unreadable(value):
    with pytest.raises(UnreadableImage):
        decode_image(value)


def test_damaged_files_raise_no_other_error():
    draw = random.Random(0)
    unreadable = 0
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        data = encoded(picture((24, 16)), kind)
        for _ in range(50):
            damaged = bytearray(data)
            for _ in range(3):
                damaged[draw.randrange(len(data))] = draw.randrange(256)
            try:
                decode_image({"bytes": bytes(damaged), "path": None})
            except UnreadableImage:
                unreadable += 1
    assert 50 < unreadable < 200


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="image_interpolation_mode 'cubic': unknown; allowed are lanczos, bilinear"):
        Preprocessing(32, "cubic")
    with pytest.raises(ValueError, match="resolution 0: must be at least 1"):
        Preprocessing(0)
