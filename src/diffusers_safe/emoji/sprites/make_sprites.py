"""Creates the sprites in the folders next to this file. Only this script needs the artwork.

apt-get install fonts-noto-color-emoji
python make_sprites.py noto /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

npm pack @iconify-json/twemoji @iconify-json/fluent-emoji-flat    # then unpack both; pip install resvg-py
python make_sprites.py twemoji twemoji/package
python make_sprites.py fluent fluent-emoji-flat/package
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusers_safe.emoji.scenes import EMOJI


SIZE = 64
BITMAP_SIZE = 109  # the only bitmap size of the font


def glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    return canvas


def vector_icon(character: str, package: Path) -> Image.Image:
    """An emoji of an Iconify package, 256 pixels wide."""
    import resvg_py

    icons, names = (json.loads((package / name).read_text()) for name in ("icons.json", "chars.json"))
    code = f"{ord(character):x}"
    icon = icons["icons"][names.get(code) or names[f"{code}-fe0f"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="256" height="256">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def fit(image: Image.Image) -> Image.Image:
    """Crops an image to its content and centers it in a square of 64 pixels."""
    drawn = image.crop(image.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")


if __name__ == "__main__":
    artwork, source = sys.argv[1], Path(sys.argv[2])
    font = ImageFont.truetype(source, BITMAP_SIZE) if artwork == "noto" else None
    folder = Path(__file__).parent / artwork
    folder.mkdir(exist_ok=True)
    for members in EMOJI.values():
        for name, character in members.items():
            image = glyph(character, font) if font else vector_icon(character, source)
            fit(image).save(folder / f"{name}.png", optimize=True)
