"""Images for judging an embedded model by eye.

    python benchmarks/emoji_pictures.py --model emoji --output_dir runs/pictures
    python benchmarks/emoji_pictures.py --model emoji --output_dir runs/pictures --page docs/images/emoji.jpg

The page shows each object: its sprite, and the images that the model generates for `"a {object}"` with three seeds.
The folder `blind` contains one image of each object, shuffled and without names, for a blind test by a person who has
not seen the prompts. `blind/answers.json` contains the names.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageDraw, ImageFont

from diffusers_safe.arguments import option, required, typed
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.emoji import MODEL_NAME
from diffusers_safe.emoji.evaluation import SETTINGS, prompt_rows
from diffusers_safe.emoji.render import load_sprite
from diffusers_safe.emoji.scenes import OBJECTS, prompt_for
from diffusers_safe.generation.generate import generate
from diffusers_safe.generation.manifest import load_images
from diffusers_safe.loading import load_pipeline
from diffusers_safe.messages import exit_with_error


SIDE, COLUMNS, LABEL, GAP = 96, 3, 20, 12  # COLUMNS is in objects, the others in pixels


@typed
@dataclass
class PicturesArguments:
    output_dir: str = required("Folder for the images, the page and the blind test.")
    model: str = option(MODEL_NAME, "Name of an embedded model, or folder of a pipeline.")
    seeds: int = option(3, "Images per object on the page.", at_least=1)
    seed: int = option(0, "Seed from which the seeds of all images are derived.")
    num_inference_steps: int = option(SETTINGS.num_inference_steps, "Sampler steps.", at_least=1)
    guidance_scale: float = option(SETTINGS.guidance_scale, "Classifier-free guidance.")
    page: str | None = option(None, "File of the page. Default: page.png in the output folder.")


def make_page(images: dict[str, list[Image.Image]]) -> Image.Image:
    """A page of all objects, each with its name, its sprite and its images."""
    count = 1 + max(map(len, images.values()))
    width, height = count * SIDE + (count - 1) * 4, LABEL + SIDE
    rows = -(-len(images) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (width + 3 * GAP) + GAP, rows * (height + GAP) + GAP), "#f6f5f1")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for place, (name, shown) in enumerate(images.items()):
        left = GAP + (place // rows) * (width + 3 * GAP)
        top = GAP + (place % rows) * (height + GAP)
        canvas.text((left, top), name, "#1d2127", font)
        sprite = load_sprite(name).convert("RGBA")
        ground = Image.new("RGBA", sprite.size, "#ffffff")
        for column, picture in enumerate([Image.alpha_composite(ground, sprite).convert("RGB"), *shown]):
            large = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(large, (left + column * (SIDE + 4), top + LABEL))
    return page


def write_blind_test(images: dict[str, list[Image.Image]], folder: Path, seed: int) -> None:
    """Writes one numbered image of each object in random order, and a file with their names."""
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.permutation(list(images))]
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, 1):
        picture = images[name][rng.integers(len(images[name]))]
        picture.resize((4 * SIDE, 4 * SIDE), Image.Resampling.LANCZOS).save(folder / f"{number:02}.png")
    answers = {f"{number:02}": name for number, name in enumerate(names, 1)}
    (folder / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_dataclass(PicturesArguments, __doc__, argv)
    folder = Path(args.output_dir)
    with exit_with_error():
        pipeline = load_pipeline(args.model, f"model '{args.model}'", dtype=torch.float32).to(PartialState().device)
        settings = replace(SETTINGS, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
        rows = prompt_rows([(name, prompt_for(name), {}) for name in OBJECTS], args.seeds, args.seed)
        manifest = generate(pipeline, rows, folder / "images", settings, 32, "images")
        pictures = map(Image.fromarray, load_images(folder / "images", manifest))
        images: dict[str, list[Image.Image]] = {}
        for row, picture in zip(rows, pictures):
            images.setdefault(row.labels["subject"], []).append(picture)
        page = Path(args.page or folder / "page.png")
        page.parent.mkdir(parents=True, exist_ok=True)
        make_page(images).save(page, **({"quality": 88} if page.suffix == ".jpg" else {}))
        write_blind_test(images, folder / "blind", args.seed)
        print(page.resolve())


if __name__ == "__main__":
    main()
