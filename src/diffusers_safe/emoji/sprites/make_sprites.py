"""Makes the sprites beside this file from Noto Color Emoji. Needs the font only here, never for its users.

apt-get install fonts-noto-color-emoji
python src/diffusers_safe/emoji/sprites/make_sprites.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusers_safe.emoji.scenes import EMOJI


SIZE = 64
BITMAP_SIZE = 109  # the only size of the font's bitmaps


def make_sprite(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    drawn = canvas.crop(canvas.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")


if __name__ == "__main__":
    font = ImageFont.truetype(sys.argv[1], BITMAP_SIZE)
    for members in EMOJI.values():
        for name, character in members.items():
            make_sprite(character, font).save(Path(__file__).parent / f"{name}.png", optimize=True)
