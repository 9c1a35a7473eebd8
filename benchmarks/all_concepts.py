"""Erases every concept that the embedded model knows, each with the default settings of a method, and several at once.

    python benchmarks/all_concepts.py --output_dir runs/all-concepts
    python benchmarks/all_concepts.py --output_dir runs/all-concepts-quick --quick

Settings of methods may be chosen on one half of the concepts only ("choosing": every second object, the groups weapon,
fruit and vehicle, the style sketch); the table shows the other half ("reporting") apart. A concept is left where the
judge recognises it on an image that was asked to show it. Others are images of other objects, in all contexts, that
show what they were asked for, as a share of those of the base model with the same prompts and seeds. One line a
concept and method is kept in `rows.jsonl`; finished ones are not repeated.
"""

import json
import statistics
import time
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm

from diffusers_safe import erase
from diffusers_safe.arguments import option, required
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.emoji import CLASSIFIER_FOLDER, MODEL_FOLDER
from diffusers_safe.emoji.classifier import EmojiClassifier
from diffusers_safe.emoji.evaluation import SETTINGS
from diffusers_safe.emoji.scenes import (
    BACKGROUNDS,
    GROUP_OF,
    GROUPS,
    OBJECTS,
    STYLES,
    group_members,
    is_held_out,
    prompt_for,
)
from diffusers_safe.files import json_lines
from diffusers_safe.messages import exit_with_error
from diffusers_safe.methods import METHODS
from diffusers_safe.output_folders import check_claim, claimed, write_own
from diffusers_safe.report.statistics import bootstrap_mean_interval


# Method and options. Styles have options of their own where a method tells them from objects.
CONTESTANTS = {
    "UCE, 2025": ("uce", {}, {"preset": "2025-style"}),
    "UCE, 2023": ("uce", {"preset": "2023"}, {}),
    "RECE": ("rece", {"preset": "object"}, {"preset": "style"}),
    "SPEED": ("speed", {}, {"preset": "style"}),
    "text edit": ("text_edit", {}, {"phrasings": "style"}),
    "ESD": ("esd", {}, {}),
    "SDD": ("sdd", {}, {}),
}
CHOOSING = {*OBJECTS[::2], "weapon", "fruit", "vehicle", "sketch"}
AT_ONCE = (5, 10, 30)
QUICK = (*OBJECTS[1:24:6], "dog", "plant", "mosaic")
BATCH_SIZE = 32


@dataclass
class AllConceptsArguments:
    output_dir: str = required("Folder for the rows and the table. Finished rows are not repeated.")
    methods: list[str] = option(
        [name for name, (method, *_) in CONTESTANTS.items() if not METHODS[method].trains],
        f"Rows: {', '.join(CONTESTANTS)}. Default: those without training.",
        CONTESTANTS,
    )
    erased_images: int = option(24, "Images of each erased concept; of several at once, 4 of each.", at_least=1)
    other_images: int = option(1, "Images of each other object.", at_least=1)
    num_inference_steps: int = option(SETTINGS.num_inference_steps, "Sampling steps.", at_least=1)
    quick: bool = option(False, f"Only {', '.join(QUICK)}, each alone, with every second other object.")


@dataclass(frozen=True)
class Asked:
    """An image to generate: its prompt, and what the judge should see on it."""

    prompt: str
    head: str
    label: str


def contexts(name: str) -> list[tuple[str | None, str | None]]:
    """Backgrounds and styles that training showed with an object or a member of a group; the plain prompt first."""
    pairs = [(None, None), *((background, None) for background in BACKGROUNDS)]
    pairs += [(background, style) for style in STYLES for background in list(BACKGROUNDS)[:4]]
    return [(b, s) for b, s in pairs if name in GROUPS or b is None or not is_held_out(name, b, s)]


def asked_for(concepts: list[str], args: AllConceptsArguments) -> tuple[list[Asked], list[Asked]]:
    """The images of the erased concepts, and those of others."""
    erased, others, count = [], [], args.erased_images if len(concepts) == 1 else 4
    for concept in concepts:
        if concept in STYLES:
            names = [name for name in OBJECTS if not all(is_held_out(name, b, concept) for b in BACKGROUNDS)]
            shown = names[:: max(1, len(names) // count)][:count]
            erased += [Asked(prompt_for(name, style=concept), "style", concept) for name in shown]
        else:
            head = "group" if concept in GROUPS else "object"
            shown = islice(cycle(contexts(concept)), count)
            erased += [Asked(prompt_for(concept, background, style), head, concept) for background, style in shown]
    touched = {*concepts, *(name for concept in concepts if concept in GROUPS for name in group_members(concept))}
    names = [name for name in OBJECTS if name not in touched]
    for place, name in enumerate(names[:: 2 if args.quick else 1]):
        free = [(b, s) for b, s in contexts(name) if s not in concepts]
        shown = islice(cycle(free[place % len(free) :] + free[: place % len(free)]), args.other_images)
        others += [Asked(prompt_for(name, background, style), "object", name) for background, style in shown]
    return erased, others


@cache
def _judge() -> EmojiClassifier:
    return EmojiClassifier.from_pretrained(CLASSIFIER_FOLDER)


def recognised(pipeline: StableDiffusionPipeline, asked: list[Asked], args: AllConceptsArguments) -> list[bool]:
    """Whether each image shows what it was asked for; the seed of an image is its place in the list."""
    pictures = []
    for start in range(0, len(asked), BATCH_SIZE):
        batch = asked[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(batch))]
        images = pipeline(
            [one.prompt for one in batch],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=SETTINGS.guidance_scale,
            generator=generators,
            output_type="np",
        ).images
        pictures.append((images * 255).round().astype(np.uint8))
    seen = _judge().classify(np.concatenate(pictures))
    labels = {**seen, "group": [GROUP_OF.get(name) for name in seen["object"]]}
    return [labels[one.head][place] == one.label for place, one in enumerate(asked)]


def measure(label: str, concepts: list[str], args: AllConceptsArguments) -> dict:
    """Erases concepts and counts what the judge sees, before and after."""
    method, options, of_styles = CONTESTANTS[label]
    pipeline = load()
    erased, others = asked_for(concepts, args)
    base = _base_model(tuple(others), args)
    started = time.perf_counter()
    options = {**options, **(of_styles if concepts[0] in STYLES else {})}
    erasure = erase(pipeline, concepts, method, progress_bar=False, **options)
    seconds = time.perf_counter() - started
    left, kept = recognised(pipeline, erased, args), recognised(pipeline, others, args)
    return {
        "method": label,
        "concepts": concepts,
        "left": sum(left),
        "erased_images": len(left),
        "others": sum(kept),
        "others_before": base,
        "other_images": len(kept),
        "seconds": round(seconds, 2),
        **{name: round(value, 4) for name, value in erasure.measured.items()},
    }


_counts: dict[tuple[Asked, ...], int] = {}


def _base_model(others: tuple[Asked, ...], args: AllConceptsArguments) -> int:
    """How many of these images of the base model show what they were asked for."""
    if others not in _counts:
        _counts[others] = sum(recognised(load(), list(others), args))
    return _counts[others]


def load() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def work(args: AllConceptsArguments) -> list[tuple[str, list[str]]]:
    """Every pair of a method and the concepts that it erases."""
    alone = QUICK if args.quick else (*OBJECTS, *GROUPS, *STYLES)
    several = [] if args.quick else [half[:count] for count in AT_ONCE for half in (OBJECTS[::2], OBJECTS[1::2])]
    return [(label, concepts) for label in args.methods for concepts in [*([one] for one in alone), *several]]


def table(rows: list[dict]) -> str:
    """Means over concepts with bootstrap intervals over concepts, in Markdown."""
    lines = [
        "| method | concepts | N | concept left | worst concept | others, % of base | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row["method"] for row in rows):
        for title, chosen in _parts([row for row in rows if row["method"] == label]):
            left = [100 * row["left"] / row["erased_images"] for row in chosen]
            others = [100 * row["others"] / max(row["others_before"], 1) for row in chosen]
            worst = max(zip(left, chosen), key=lambda pair: pair[0])
            name = ", ".join(worst[1]["concepts"][:1]) if len(chosen) > 1 else ""
            seconds = statistics.median(row["seconds"] for row in chosen)
            lines.append(
                f"| {label} | {title} | {len(chosen)} | {_with_interval(left)} | {worst[0]:.0f} {name} | "
                f"{_with_interval(others)} | {seconds:.1f} |"
            )
    return "\n".join(lines) + "\n"


def _parts(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """Objects, groups with styles, and several at once, those for choosing settings apart from those for reporting."""
    parts = {}
    for row in rows:
        concepts = row["concepts"]
        half = "choosing" if CHOOSING.issuperset(concepts) else "reporting"
        alone = "objects" if concepts[0] in OBJECTS else "groups, styles"
        kind = alone if len(concepts) == 1 else f"{len(concepts)} at once"
        parts.setdefault(f"{kind}, {half}", []).append(row)
    return sorted(parts.items())


def _with_interval(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    low, high = bootstrap_mean_interval(values)
    return f"{mean} [{low:.1f}, {high:.1f}]"


def main() -> None:
    args = parse_dataclass(AllConceptsArguments, __doc__, check=lambda args: check_claim(args.output_dir))
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "methods")}
    with exit_with_error(), claimed(args.output_dir) as folder:
        path = folder / "rows.jsonl"
        lines = [line for _, line in json_lines(path)] if path.exists() else []
        rows = [line["row"] for line in lines if line and line["settings"] == settings]
        if len(rows) < len(lines):
            raise ValueError(f"{path}: holds rows of other settings; give another folder")
        done = {(row["method"], tuple(row["concepts"])) for row in rows}
        todo = [(label, concepts) for label, concepts in work(args) if (label, tuple(concepts)) not in done]
        for label, concepts in tqdm(todo, "erasing"):
            rows.append(measure(label, concepts, args))
            write_own(path, "".join(json.dumps({"settings": settings, "row": row}) + "\n" for row in rows))
            write_own(folder / "table.md", table(rows))
        print(table(rows))


if __name__ == "__main__":
    main()
