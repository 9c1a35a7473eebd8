"""Renders scenes: a sprite of an emoji, rotated, scaled and placed on a background, in a style."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from .scenes import BACKGROUNDS, UPRIGHT, Scene, Variation, draw_scene


RESOLUTION = 64
SPRITES = Path(__file__).parent / "sprites"
# The embedded models are trained on the first; the second judge on all, so that it recognises objects, not drawings.
ARTWORK = ("noto", "twemoji", "fluent")


@cache
def load_sprite(name: str, artwork: str = "noto") -> Image.Image:
    """The 64 x 64 sprite of an object, with colors premultiplied by alpha for resampling."""
    with Image.open(SPRITES / artwork / f"{name}.png") as image:
        return image.convert("RGBA").convert("RGBa")


def render(scene: Scene, artwork: str = "noto") -> Image.Image:
    """Renders a scene as a 64 x 64 RGB image with the sprites of one of `ARTWORK`. The result is deterministic."""
    sprite = _place(load_sprite(scene.name, artwork), scene)
    rgba = np.asarray(sprite, dtype=np.float32)
    alpha = rgba[..., 3:] / 255
    ink = rgba[..., :3]  # premultiplied
    ground = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32) * scene.shade
    # Light from above, and a soft glow behind the object, so that it always stands out from the background.
    ground = ground * np.linspace(1.05, 0.95, RESOLUTION, dtype=np.float32)[:, None, None]
    ground = np.broadcast_to(ground, ink.shape)
    glow = np.asarray(sprite.getchannel("a").filter(ImageFilter.GaussianBlur(2)), dtype=np.float32)[..., None] / 255
    ground = ground + (250 - ground) * np.minimum(glow * 1.2, 0.7)
    if scene.style == "sketch":
        ink = _sketch(ink, alpha)
    elif scene.style == "sepia":
        ink, ground = _sepia(ink, alpha), 0.6 * ground + 0.4 * _sepia(ground, 1.0)
    picture = ground * (1 - alpha) + ink
    if scene.style == "mosaic":
        picture = _mosaic(picture)
    return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))


def render_many(
    seed: int, start: int, count: int, hold_out: bool = True, variation: Variation = UPRIGHT
) -> tuple[np.ndarray, list[Scene]]:
    """Renders images `start` to `start + count - 1` of a seed.

    Returns:
        `tuple[np.ndarray, list[Scene]]`: Images of shape `(count, 64, 64, 3)`, `uint8`, and their scenes.
    """
    scenes = [draw_scene(np.random.default_rng([seed, i]), hold_out, variation) for i in range(start, start + count)]
    pictures = np.stack([np.asarray(render(scene)) for scene in scenes])
    return pictures, scenes


def _place(sprite: Image.Image, scene: Scene) -> Image.Image:
    # PIL takes the map from image to sprite coordinates: inverse shift, rotation, scale and flip.
    scale = sprite.width / scene.size
    cos, sin = np.cos(np.radians(scene.turn)) * scale, np.sin(np.radians(scene.turn)) * scale
    flip = -1 if scene.mirror else 1
    a, b, d, e = flip * cos, flip * sin, -sin, cos
    x, y = scene.center
    middle = sprite.width / 2
    matrix = (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y)
    # The scale is at most 1.7, so bicubic sampling has no visible aliasing.
    return sprite.transform((RESOLUTION, RESOLUTION), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def _luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _sketch(ink: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Dark lines at the edges of the object, on paper."""
    light = _luminance(ink) + 255 * (1 - alpha[..., 0])
    dy, dx = np.gradient(light)
    rim_y, rim_x = np.gradient(alpha[..., 0] * 255)
    edge = np.hypot(dx, dy) / 45 + np.hypot(rim_x, rim_y) / 90
    tone = 250 - 50 * (1 - light / 255) - 210 * np.minimum(edge, 1.0)
    return tone[..., None].clip(20, 255) * alpha


def _sepia(rgb: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
    light = _luminance(rgb)[..., None]
    return light * np.array([1.08, 0.86, 0.60], dtype=np.float32) + alpha * np.array([18, 8, 0], dtype=np.float32)


def _mosaic(picture: np.ndarray, tile: int = 4) -> np.ndarray:
    """Tiles of a single color with dark joints."""
    count = RESOLUTION // tile
    tiles = picture.reshape(count, tile, count, tile, 3).mean(axis=(1, 3), keepdims=True)
    out = np.broadcast_to(tiles, (count, tile, count, tile, 3)).copy()
    out[:, -1] *= 0.62
    out[:, :, :, -1] *= 0.62
    return out.reshape(picture.shape)
