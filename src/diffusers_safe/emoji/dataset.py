"""Images of emoji as a captioned `datasets.Dataset`, rendered from a seed.

    python -m diffusers_safe.emoji.dataset --num_images 8000 --output_dir runs/emoji-data

writes them as a parquet file that `train_distill.py --train_data_dir runs/emoji-data --caption_column caption` reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value

from ..arguments import option, required, typed
from ..command_line import parse_dataclass
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, check_claim, claimed, prepare_files
from .render import render
from .scenes import draw_caption, draw_scene


FILE_NAME = "train.parquet"
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
    """Creates captioned 64 x 64 images. Image `i` of a seed does not depend on `num_images`.

    Args:
        num_images (`int`): Number of images, at least 1.
        seed (`int`, defaults to 0): Seed of the images. The embedded model was trained on seed 0; its judge is
            tested on seed 1.
        hold_out (`bool`, defaults to `True`): Whether to leave out the combinations that are held out of training.
        cache_dir (`str`, *optional*): Cache folder of `datasets`.

    Returns:
        `datasets.Dataset`: Columns `image`, `caption`, `object`, `group`, `background`, `style` (`"plain"` for none).
        A caption does not name all of them.

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


@typed
@dataclass
class DatasetArguments:
    output_dir: str = required("Folder for the parquet file.")
    num_images: int = option(8000, "Number of images.", at_least=1)
    seed: int = option(0, "Seed of the images. The embedded model was trained on those of 0.", at_least=0)

    overwrite: bool = option(False, OVERWRITE_HELP)

    @property
    def claim(self) -> dict:
        return {"kind": "dataset", "replaces": (FILE_NAME,), "overwrite": self.overwrite}


def main() -> None:
    args = parse_dataclass(DatasetArguments, __doc__, check=lambda args: check_claim(args.output_dir, **args.claim))
    path, partial = Path(args.output_dir) / FILE_NAME, Path(args.output_dir) / f".{FILE_NAME}.partial"
    with exit_with_error(), claimed(args.output_dir, **args.claim) as folder:
        emoji_dataset(args.num_images, args.seed).to_parquet(partial)
        prepare_files(folder, FILE_NAME)
        partial.replace(path)
    print(f"{args.num_images:,} images in {path}")


if __name__ == "__main__":
    main()
