"""Every kind of image becomes the same 8-bit RGB, in every part of the package."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_safe.generation.folders import ImageFolder
from diffusers_safe.generation.manifest import load_image
from diffusers_safe.generation.rows import PromptRow
from diffusers_safe.images import UnreadableImage, open_rgb, to_rgb
from diffusers_safe.metrics.resizing import to_tensor
from diffusers_safe.preparation.filters import Filters
from diffusers_safe.preparation.pictures import read_picture
from diffusers_safe.training.pictures.images import decode_image
from picture_files import encoded


RAMP = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(6, 8)  # black to white
WIDE = RAMP.astype(np.uint16) * 257


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    Image.fromarray(RAMP[::-1, ::-1].copy()).save(file, "PNG", exif=exif)
    return file.getvalue()


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(RAMP), Image.new("L", (8, 6), 9)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], lossless=True)
    return file.getvalue()


def with_alpha() -> Image.Image:
    """A black image with an alpha channel: the ramp appears on a white background."""
    return Image.merge("LA", [Image.new("L", (8, 6)), Image.fromarray(255 - RAMP)])


def palette() -> bytes:
    """Entry i is black with an opacity of 255 - i, so the ramp appears on a white background."""
    image = Image.frombytes("P", (8, 6), RAMP.tobytes())
    image.putpalette([0] * 768)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(255, -1, -1)))
    return file.getvalue()


KINDS = {
    "8-bit gray": lambda: encoded(Image.fromarray(RAMP)),
    "16-bit PNG": lambda: encoded(Image.fromarray(WIDE)),
    "16-bit TIFF": lambda: encoded(Image.fromarray(WIDE), "TIFF"),
    "16-bit big-endian": lambda: encoded(Image.frombytes("I;16B", (8, 6), WIDE.astype(">u2").tobytes()), "TIFF"),
    "32-bit, up to 2^31 - 1": lambda: encoded(
        Image.fromarray((RAMP / 255 * (2**31 - 1)).round().astype(np.int32)), "TIFF"
    ),
    "32-bit, up to 65535": lambda: encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"),
    "32-bit, up to 255": lambda: encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "float, up to 1": lambda: encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "float, up to 255": lambda: encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "float, up to 65535": lambda: encoded(Image.fromarray(WIDE.astype(np.float32)), "TIFF"),
    "CMYK": lambda: encoded(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "TIFF"),
    "LA": lambda: encoded(with_alpha()),
    "RGBA": lambda: encoded(with_alpha().convert("RGBA")),
    "palette with transparency": palette,
    "EXIF, upside down": turned,
    "GIF of two frames": lambda: animated("GIF"),
    "PNG of two frames": lambda: animated("PNG"),
    "WebP of two frames": lambda: animated("WEBP"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_the_same_in_every_place(kind, tmp_path):
    data = KINDS[kind]()
    path = tmp_path / "row_0.png"  # PIL detects the format from the content
    path.write_bytes(data)
    (row,) = ImageFolder("theirs", tmp_path).find([PromptRow("row_0", "a ramp", 0)])
    assert row["black"] is False
    places = {
        "file": open_rgb(path),
        "bytes": open_rgb(data),
        "evaluation": load_image(tmp_path, row),
        "training": decode_image({"bytes": data, "path": None}),
        "metric": Image.fromarray(to_tensor(Image.open(path)).permute(1, 2, 0).byte().numpy()),
    }
    for place, image in places.items():
        assert image.mode == "RGB" and not image.info, place
        assert np.abs(np.asarray(image).astype(int) - RAMP[..., None]).max() <= 1, place
    prepared = Image.open(io.BytesIO(read_picture(data, Filters()).jpeg))
    assert np.abs(np.asarray(prepared).astype(int) - RAMP[..., None]).mean() < 4  # JPEG


def test_one_bit_pictures_are_black_and_white():
    image = open_rgb(encoded(Image.fromarray(RAMP > 127)))
    assert (np.asarray(image) == np.where(RAMP > 127, 255, 0)[..., None]).all()


def test_the_transparent_value_of_a_16_bit_picture_is_white():
    file = io.BytesIO()
    Image.fromarray(WIDE).save(file, "PNG", transparency=0)
    assert open_rgb(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_negative_values_are_black_and_constant_images_are_valid():
    assert to_rgb(Image.fromarray(np.array([[-5.0, 0.0, 1.0]], np.float32))).tobytes() == bytes([0] * 6 + [255] * 3)
    assert to_rgb(Image.fromarray(np.zeros((1, 2), np.float32))).tobytes() == bytes(6)
    assert to_rgb(Image.fromarray(np.array([[0.0, 1e6]], np.float32))).tobytes() == bytes([0] * 3 + [255] * 3)


UNREADABLE = {
    "no picture": (b"text", "it is not an image of a known kind"),
    "cut off": (encoded(Image.effect_noise((64, 64), 90))[:2000], "truncated"),
    "not a number": (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "not finite"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_images_are_named(case, tmp_path):
    data, reason = UNREADABLE[case]
    path = tmp_path / "row_0.png"
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=f"row_0.png cannot be read as an image .*{reason}"):
        open_rgb(path)
    with pytest.raises(ValueError, match=f"theirs: .*row_0.png cannot be read as an image .*{reason}"):
        ImageFolder("theirs", tmp_path).find([PromptRow("row_0", "a ramp", 0)])


def test_initial_images_may_be_of_any_kind(make_tiny_pipeline):
    """The stock pipelines divide 16-bit values by 255, and mistake RGBA for latents, which also have four channels."""
    from diffusers_safe import SafetyConfig, StableDiffusionImg2ImgPipelineSafe, StableDiffusionInpaintPipelineSafe

    def image_of(kind, picture, **others):
        pipeline = kind(**make_tiny_pipeline().components, requires_safety_checker=False, safety_concept="a gun")
        pipeline.set_progress_bar_config(disable=True)
        call = {"strength": 0.5, "num_inference_steps": 4, "output_type": "np", "image": picture, **others}
        return pipeline("a cat", generator=torch.Generator().manual_seed(0), **call, **SafetyConfig.MAX).images

    wide = Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1)))
    expected = image_of(StableDiffusionImg2ImgPipelineSafe, to_rgb(wide))
    gray = to_rgb(wide).convert("L")
    for picture in (wide, gray, to_rgb(wide).convert("RGBA"), [wide]):
        assert np.array_equal(image_of(StableDiffusionImg2ImgPipelineSafe, picture), expected)
    mask = Image.fromarray(np.repeat(np.array([[0, 65535]], np.uint16), 32, axis=1).repeat(64, axis=0))
    masked = [
        image_of(StableDiffusionInpaintPipelineSafe, picture, mask_image=area)
        for picture, area in ((wide, mask), (to_rgb(wide), to_rgb(mask).convert("L")))
    ]
    assert np.array_equal(*masked)


def test_a_manifest_of_a_16_bit_picture_is_read_as_it_is(tmp_path):
    """An image of another tool: `uint16` arrays are saved as 16-bit PNGs."""
    Image.fromarray(WIDE).save(tmp_path / "x.png")
    (row,) = ImageFolder("x", tmp_path).find([PromptRow("x", "a ramp", 0)])
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    (again,) = ImageFolder("x", tmp_path).find([PromptRow("x", "a ramp", 0)])
    assert np.array_equal(np.asarray(load_image(tmp_path, again))[..., 0], RAMP)
