"""Measures the quality of an embedded model.

    python -m diffusers_safe.emoji.quality --model emoji --output_dir runs/quality

generates every object, group, style and background and prints how many of them the judges recognise, how well the
autoencoder reconstructs, and how fast the model is.
"""

import json
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..arguments import typed
from ..command_line import parse_dataclass
from ..embedded import locate_model
from ..generation.generate import generate
from ..generation.manifest import load_images
from ..generation.rows import GenerationSettings, PromptRow
from ..loading import load_pipeline
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, check_claim, claimed, prepare_files
from ..provenance import library_versions
from ..report.results import RESULTS_NAME, write_results
from ..report.statistics import Estimate
from . import JUDGE_FOLDERS, MODEL_NAME
from .classifier import HEADS, EmojiClassifier
from .evaluation import SETTINGS, prompt_rows
from .quality_card import check_card, quality_table, write_card
from .quality_speed import autoencoder_psnr, measure_speed
from .render import render_many
from .scenes import BACKGROUNDS, GROUPS, OBJECTS, STYLES, VARIED, Scene, is_held_out, prompt_for, shows


IMAGES_PER_GROUP = 4  # times the number of images of an object
RENDER_SEED = 2**32  # larger than any seed of a training


def evaluate_model(
    pipeline: DiffusionPipeline,
    judges: dict[str, EmojiClassifier],
    folder: str | Path,
    images_per_object: int = 8,
    seed: int = 0,
    settings: GenerationSettings = SETTINGS,
    batch_size: int = 32,
    num_renders: int = 2000,
    overwrite: bool = False,
) -> dict:
    """Measures how well a model generates what its prompts ask for, and how accurate the judges are; prints the
    tables.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): A text-to-image model of 64 x 64 pixels.
        judges (`dict[str, EmojiClassifier]`): Judges by name; the first is that of the evaluations, the others check
            it.
        folder (`str` or `Path`): Folder of images and `results.json`. A stopped run continues there.
        images_per_object (`int`, defaults to 8): Images of each `"a {object}"`, at least 1. There are four times as
            many of each group, and one eighth for each object in each style and on each background.
        seed (`int`, defaults to 0): Determines the seeds of all images.
        settings (`GenerationSettings`, *optional*): Sampling settings.
        batch_size (`int`, defaults to 32): Number of images generated at once.
        num_renders (`int`, defaults to 2000): Number of new renders, of varied sizes, places and angles, for
            the tests of judges and autoencoder.
        overwrite (`bool`, defaults to `False`): Replace images and results of another model in `folder`.

    Returns:
        `dict`: The contents of `results.json`; every share is an [`Estimate`]:

        - `judges`: name of the judge -> what it recognises:
            - `objects`, `groups`, `styles`, `backgrounds`: name -> share of recognised images, without combinations
              held out of training.
            - `objects with styles`, `objects with backgrounds`: name -> share of the same images that show their
              object.
            - `mean`: the same six names -> average over prompts; bootstrap over prompts, for groups over images.
            - `held_out`: `styles`, `backgrounds` -> share of images of held-out combinations with correct object and
              style (background).
            - `renders`: head -> accuracy on new renders.
        - `agreement`: share of all images on which all judges recognise the same object.
        - `autoencoder`: style (or `"all"`) -> PSNR on new renders, in dB.
        - `protocol`: settings, seeds, fingerprint, versions, black images, speed.

    Raises:
        `ValueError`: If a number is out of range or `folder` holds images of another model or other settings.
    """
    if num_renders < 1:
        raise ValueError(f"num_renders is {num_renders}; it must be at least 1")
    folder = Path(folder)
    rows = quality_rows(images_per_object, seed)
    with claimed(folder, **_claim(images_per_object, seed, overwrite)):
        manifest = generate(pipeline, rows, folder / "images", settings, batch_size, "images", overwrite=overwrite)
    images = load_images(folder / "images", manifest)
    renders, scenes = render_many(RENDER_SEED, 0, num_renders, hold_out=False, variation=VARIED)
    results, objects = {"judges": {}}, []
    for name, judge in judges.items():
        seen = judge.classify(images)
        objects.append(seen["object"])
        results["judges"][name] = {**_recognised(rows, seen), "renders": _accuracy(judge, renders, scenes)}
    if len(judges) > 1:
        results["agreement"] = _rate(np.array([len(set(named)) == 1 for named in zip(*objects)]))
    results["autoencoder"] = autoencoder_psnr(pipeline.vae, renders, [scene.style or "plain" for scene in scenes])
    results["protocol"] = {
        "images_per_object": images_per_object,
        "images": len(rows),
        "renders": num_renders,
        "seed": seed,
        **_sampling(pipeline, settings),
        "model": manifest[0]["model"],
        "black_images": sum(row["black"] for row in manifest),
        "speed": measure_speed(pipeline, settings, batch_size),
    }
    prepare_files(folder, RESULTS_NAME)
    write_results(folder, results)
    print(quality_table(results))
    return results


def _claim(images_per_object: int, seed: int, overwrite: bool) -> dict:
    run = {"images_per_object": images_per_object, "seed": seed}

    def is_own(folder: Path) -> bool:
        try:
            protocol = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))["protocol"]
            return run.items() <= protocol.items()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    return {"kind": "quality", "run": run, "continues": (RESULTS_NAME,), "overwrite": overwrite, "is_own": is_own}


def quality_rows(images_per_object: int, seed: int) -> list[PromptRow]:
    """The prompts of [`evaluate_model`]. The label `part` of a row is the entry of the results that it counts for."""
    rows = prompt_rows([(name, prompt_for(name), {"part": "objects"}) for name in OBJECTS], images_per_object, seed)
    groups = [(group, prompt_for(group), {"part": "groups"}) for group in GROUPS]
    rows += prompt_rows(groups, IMAGES_PER_GROUP * images_per_object, seed)
    pairs = []
    for name in OBJECTS:
        for style in STYLES:
            # The prompt names no background, so a style is held out if training shows it on none.
            held_out = all(is_held_out(name, background, style) for background in BACKGROUNDS)
            labels = {"part": "styles", "style": style, "held_out": held_out}
            pairs.append((name, prompt_for(name, style=style), labels))
        for background in BACKGROUNDS:
            labels = {"part": "backgrounds", "background": background, "held_out": is_held_out(name, background, None)}
            pairs.append((name, prompt_for(name, background), labels))
    return rows + prompt_rows(pairs, max(1, images_per_object // 8), seed)


def _sampling(pipeline: DiffusionPipeline, settings: GenerationSettings) -> dict:
    return {
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "versions": library_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _rate(hits: np.ndarray) -> Estimate:
    return Estimate.rate(int(hits.sum()), len(hits))


def _recognised(rows: list[PromptRow], seen: dict[str, list[str]]) -> dict:
    labels = [row.labels for row in rows]
    part = np.array([label["part"] for label in labels])
    held_out = np.array([label.get("held_out", False) for label in labels])
    shown = np.array([shows(name, row.labels["subject"]) for name, row in zip(seen["object"], rows)])
    results, means, held = {}, {}, {}

    def measure(name: str, right: np.ndarray, chosen: np.ndarray, asked: np.ndarray, entries: list[str]) -> None:
        results[name] = {entry: _rate(right[chosen & (asked == entry)]) for entry in entries}
        # Images of one prompt are similar. There are too few groups to resample them.
        prompts = None if name == "groups" else [row.prompt for row, take in zip(rows, chosen) if take]
        means[name] = Estimate.mean(right[chosen], prompts)

    subject = np.array([label["subject"] for label in labels])
    for name, entries in (("objects", OBJECTS), ("groups", GROUPS)):
        measure(name, shown, part == name, subject, entries)
    for name, head, entries in (("styles", "style", STYLES), ("backgrounds", "background", list(BACKGROUNDS))):
        asked = np.array([label.get(head, "") for label in labels])
        right, chosen = asked == np.array(seen[head]), (part == name) & ~held_out
        measure(name, right, chosen, asked, entries)
        measure(f"objects with {name}", shown, chosen, asked, entries)
        held[name] = _rate((right & shown)[(part == name) & held_out])
    return {**results, "mean": means, "held_out": held}


def _accuracy(judge: EmojiClassifier, renders: np.ndarray, scenes: list[Scene]) -> dict[str, Estimate]:
    truth = {
        "object": [scene.name for scene in scenes],
        "group": [scene.group for scene in scenes],
        "style": [scene.style or "plain" for scene in scenes],
        "background": [scene.background for scene in scenes],
    }
    seen = judge.classify(renders)
    return {head: _rate(np.array(seen[head]) == np.array(truth[head])) for head in HEADS}


# --- command line ----------------------------------------------------------------------------------------------------


@typed
@dataclass
class QualityArguments:
    output_dir: str = field(metadata={"help": "Folder of images and results.json; a stopped run continues there."})
    model: str = field(default=MODEL_NAME, metadata={"help": "Name of an embedded model, or folder of a pipeline."})
    judges: list[str] = field(
        default_factory=lambda: list(map(str, JUDGE_FOLDERS)),
        metadata={"help": "Folders of judges. The first is the one that evaluations use."},
    )
    images_per_object: int = field(default=8, metadata={"help": "Number of images of each prompt 'a {object}'."})
    seed: int = field(default=0, metadata={"help": "Seed from which the seeds of all images follow."})
    num_inference_steps: int = field(
        default=SETTINGS.num_inference_steps, metadata={"help": "Number of sampling steps."}
    )
    guidance_scale: float = field(
        default=SETTINGS.guidance_scale, metadata={"help": "Scale of classifier-free guidance."}
    )
    batch_size: int = field(default=32, metadata={"help": "Number of images generated at once."})
    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})
    card: str | None = field(
        default=None, metadata={"help": "Model card (README.md) to write the table into, between its markers."}
    )

    def __post_init__(self):
        for name in ("images_per_object", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        folders = {locate_model(self.model): "model_index.json", **dict.fromkeys(self.judges, "config.json")}
        for folder, file in folders.items():
            if not (Path(folder) / file).is_file():
                raise ValueError(f"{folder}: no such model; the folder must hold {file}")
        if self.card is not None:
            check_card(Path(self.card))


def check_surroundings(args: QualityArguments) -> None:
    check_claim(args.output_dir, **_claim(args.images_per_object, args.seed, args.overwrite))


def main(args: QualityArguments) -> None:
    pipeline = load_pipeline(args.model, f"model '{args.model}'", dtype=torch.float32).to(PartialState().device)
    settings = replace(SETTINGS, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    results = evaluate_model(
        pipeline,
        {Path(folder).name.replace("_", " "): EmojiClassifier.from_pretrained(folder) for folder in args.judges},
        args.output_dir,
        args.images_per_object,
        args.seed,
        settings,
        args.batch_size,
        overwrite=args.overwrite,
    )
    if args.card is not None:
        write_card(args.card, results)


if __name__ == "__main__":
    arguments = parse_dataclass(QualityArguments, __doc__, check=check_surroundings)
    with exit_with_error():
        main(arguments)
