"""The emoji pictures as a captioned `datasets.Dataset`, made on the fly from a seed."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Features, Image, Value

from .render import render
from .scenes import draw_caption, draw_scene


FEATURES = Features(
    {
        "image": Image(),
        "caption": Value("string"),
        "object": Value("string"),
        "group": Value("string"),
        "background": Value("string"),
        "style": Value("string"),
    }
)


def emoji_dataset(num_images: int, seed: int = 0, hold_out: bool = True, cache_dir: str | None = None) -> Dataset:
    """Captioned 64 x 64 pictures. Picture `i` of a seed is the same whatever `num_images` is.

    Args:
        num_images (`int`): At least 1.
        seed (`int`, defaults to 0): The embedded model was trained on seed 0, its judge is tested on seed 1.
        hold_out (`bool`, defaults to `True`): Leave out the combinations that training never shows.
        cache_dir (`str`, *optional*): Where `datasets` keeps the result; its own cache by default.

    Returns:
        `datasets.Dataset`: Columns `image`, `caption`, and what the caption may or may not name: `object`, `group`,
        `background`, `style` (`"plain"` for none).

    Raises:
        `ValueError`: If `num_images` is less than 1.
    """
    if num_images < 1:
        raise ValueError(f"num_images {num_images}: must be at least 1")
    settings = {"num_images": num_images, "seed": seed, "hold_out": hold_out}
    return Dataset.from_generator(_rows, features=FEATURES, gen_kwargs=settings, cache_dir=cache_dir)


def _rows(num_images: int, seed: int, hold_out: bool) -> Iterator[dict]:
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(rng, hold_out)
        yield {
            "image": render(scene),
            "caption": draw_caption(scene, rng),
            "object": scene.name,
            "group": scene.group,
            "background": scene.background,
            "style": scene.style or "plain",
        }
