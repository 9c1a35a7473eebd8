"""Erases every concept that the embedded model knows, each with the default settings of a method, and several at once.

    python benchmarks/all_concepts.py --output_dir runs/all-concepts
    python benchmarks/all_concepts.py --output_dir runs/all-concepts-quick --quick

Settings of methods may be chosen on one half of the concepts only ("choosing": every second object, the groups weapon,
fruit and vehicle, the style sketch); the table shows the other half ("reporting") apart. A concept is left where a
judge recognises it in an image whose prompt asks for it. Others are images of other objects, in all contexts, that
show what their prompts ask for, as a share of those of the base model with the same prompts and seeds. Each share is
given for both judges of the embedded model. `rows.jsonl` has a line for each concept and method; finished ones are not
repeated.
"""

import json
import statistics
import time
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm

from diffusers_safe import erase
from diffusers_safe.arguments import option, required
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.emoji import JUDGE_FOLDERS, MODEL_FOLDER
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


class Contestant(NamedTuple):
    """A row of the table.

    Attributes:
        method (`str`): One of `METHODS`.
        options (`dict`): What differs from the method's defaults.
        of_styles (`dict`): The same for styles, where a method tells them from objects.
        starts_edited (`bool`): Whether it starts from the result of text edit.
    """

    method: str
    options: dict = {}
    of_styles: dict = {}
    starts_edited: bool = False

    @property
    def trains(self) -> bool:
        return METHODS[self.method].trains


# Of all methods that train, the same for every concept. The defaults, for Stable Diffusion, take 1000 steps or more.
TRAINING = {
    "train_method": "xattn", "retain_unconditional": True, "retain_weight": 3, "loss_space": "velocity",
    "num_inference_steps": SETTINGS.num_inference_steps, "latents_per_trajectory": 2, "trajectory_pool": 120,
    "train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler": "cosine", "max_train_steps": 80, "seed": 0,
}  # fmt: skip
SDD = {**TRAINING, "prompt_order": "matched", "sdd_target": "frozen", "sampling_fraction": 0.4, "ema_decay": 0.9}
CONTESTANTS = {
    "UCE, 2025": Contestant("uce", {}, {"preset": "2025-style"}),
    "UCE, 2023": Contestant("uce", {"preset": "2023"}),
    "RECE": Contestant("rece", {"preset": "object"}, {"preset": "style"}),
    "SPEED": Contestant("speed", {}, {"preset": "style"}),
    "text edit": Contestant("text_edit", {}, {"phrasings": "style"}),
    "ESD": Contestant("esd", {**TRAINING, "sampling_model": "frozen"}),
    "SDD": Contestant("sdd", SDD),
    "text edit, then SDD": Contestant("sdd", {**SDD, "max_train_steps": 8, "trajectory_pool": 32}, starts_edited=True),
}
CHOOSING = {*OBJECTS[::2], "weapon", "fruit", "vehicle", "sketch"}
AT_ONCE = (5, 10, 30)
HALVES = ("both", "choosing", "reporting")
QUICK = (*OBJECTS[1:24:6], "dog", "plant", "mosaic")
BATCH_SIZE = 32


@dataclass
class AllConceptsArguments:
    output_dir: str = required("Folder for the rows and the table. Finished rows are not repeated.")
    methods: list[str] = option(
        [name for name, contestant in CONTESTANTS.items() if not contestant.trains],
        f"Rows: {', '.join(CONTESTANTS)}. Default: those without training.",
        CONTESTANTS,
    )
    erased_images: int = option(24, "Images of each erased concept; of several at once, 4 of each.", at_least=1)
    other_images: int = option(1, "Images of each other object.", at_least=1)
    half: str = option("both", "Only the concepts for choosing settings, or those for reporting.", HALVES)
    num_inference_steps: int = option(SETTINGS.num_inference_steps, "Sampling steps.", at_least=1)
    others_step: int = option(1, "Images of every n-th other object only.", at_least=1)
    quick: bool = option(False, f"Only {', '.join(QUICK)}, each alone.")


@dataclass(frozen=True)
class Asked:
    """An image to generate: its prompt and seed, and what a judge should see in it."""

    prompt: str
    head: str
    label: str
    seed: int


def contexts(name: str) -> list[tuple[str | None, str | None]]:
    """Backgrounds and styles that training showed with an object or a member of a group; the plain prompt first."""
    pairs = [(None, None), *((background, None) for background in BACKGROUNDS)]
    pairs += [(background, style) for style in STYLES for background in list(BACKGROUNDS)[:4]]
    return [(b, s) for b, s in pairs if name in GROUPS or b is None or not is_held_out(name, b, s)]


def untouched(concepts: list[str]) -> list[str]:
    """The objects that are neither concepts nor members of a group that is one."""
    touched = {*concepts, *(name for concept in concepts if concept in GROUPS for name in group_members(concept))}
    return [name for name in OBJECTS if name not in touched]


def asked_for(concepts: list[str], args: AllConceptsArguments) -> tuple[list[Asked], list[Asked]]:
    """The images of the erased concepts, and those of others."""
    erased, others, count = [], [], args.erased_images if len(concepts) == 1 else 4
    for concept in concepts:
        if concept in STYLES:
            names = [name for name in OBJECTS if not all(is_held_out(name, b, concept) for b in BACKGROUNDS)]
            shown = names[:: max(1, len(names) // count)][:count]
            pairs = [(prompt_for(name, style=concept), "style") for name in shown]
        else:
            head = "group" if concept in GROUPS else "object"
            shown = islice(cycle(contexts(concept)), count)
            pairs = [(prompt_for(concept, background, style), head) for background, style in shown]
        erased += [Asked(prompt, head, concept, seed) for seed, (prompt, head) in enumerate(pairs)]
    for name in untouched(concepts)[:: args.others_step]:
        place = OBJECTS.index(name)
        free = [(b, s) for b, s in contexts(name) if s not in concepts]
        shown = islice(cycle(free[place % len(free) :] + free[: place % len(free)]), args.other_images)
        prompts = [prompt_for(name, background, style) for background, style in shown]
        others += [Asked(prompt, "object", name, 100 * place + number) for number, prompt in enumerate(prompts)]
    return erased, others


@cache
def _judges() -> dict[str, EmojiClassifier]:
    return {folder.name: EmojiClassifier.from_pretrained(folder) for folder in JUDGE_FOLDERS}


def recognised(pipeline: StableDiffusionPipeline, asked: list[Asked], args: AllConceptsArguments) -> list[list[bool]]:
    """For each image, whether the judges see in it what its prompt asks for."""
    pictures = []
    for start in range(0, len(asked), BATCH_SIZE):
        batch = asked[start : start + BATCH_SIZE]
        images = pipeline(
            [one.prompt for one in batch],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=SETTINGS.guidance_scale,
            generator=[torch.Generator().manual_seed(one.seed) for one in batch],
            output_type="np",
        ).images
        pictures.append((images * 255).round().astype(np.uint8))
    answers = []
    for judge in _judges().values():
        seen = judge.classify(np.concatenate(pictures))
        labels = {**seen, "group": [GROUP_OF.get(name) for name in seen["object"]]}
        answers.append([labels[one.head][place] == one.label for place, one in enumerate(asked)])
    return list(map(list, zip(*answers)))


def measure(label: str, concepts: list[str], args: AllConceptsArguments) -> dict:
    """Erases concepts and counts what each judge sees, before and after."""
    pipeline = load()
    erased, others = asked_for(concepts, args)
    base = _of_base_model(others, args)
    with TemporaryDirectory() as folder:
        options = contestant_options(CONTESTANTS[label], concepts)
        started = time.perf_counter()
        if CONTESTANTS[label].starts_edited:
            options["start_from"] = f"{folder}/edited"
            edit = CONTESTANTS["text edit"]
            edit_options = contestant_options(edit, concepts)
            erase(load(), concepts, edit.method, output_dir=options["start_from"], **edit_options)
        erasure = erase(pipeline, concepts, CONTESTANTS[label].method, **options)
        seconds = time.perf_counter() - started
    return {
        "method": label,
        "concepts": concepts,
        "left": _count(recognised(pipeline, erased, args)),
        "erased_images": len(erased),
        "others": _count(recognised(pipeline, others, args)),
        "others_before": _count(base),
        "other_images": len(others),
        "seconds": round(seconds, 2),
        **{name: round(value, 4) for name, value in erasure.measured.items()},
    }


def contestant_options(contestant: Contestant, concepts: list[str]) -> dict:
    """Its options for these concepts. Methods that train retain objects; none is counted with `--others_step 2`."""
    options = {"progress_bar": False, **contestant.options}
    if concepts[0] in STYLES:
        options |= contestant.of_styles
    if contestant.trains:
        options["retain_prompts"] = [prompt_for(name) for name in untouched(concepts)[1::2]]
    return options


def _count(answers: list[list[bool]]) -> dict[str, int]:
    return {name: sum(column) for name, column in zip(_judges(), zip(*answers))}


_base: dict[Asked, list[bool]] = {}


def _of_base_model(others: list[Asked], args: AllConceptsArguments) -> list[list[bool]]:
    """What the judges see in these images of the base model, each of which is generated once."""
    if missing := [one for one in others if one not in _base]:
        _base.update(zip(missing, recognised(load(), missing, args)))
    return [_base[one] for one in others]


def load() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def work(args: AllConceptsArguments) -> list[tuple[str, list[str]]]:
    """Every pair of a method and the concepts that it erases."""
    alone = [[one] for one in (QUICK if args.quick else (*OBJECTS, *GROUPS, *STYLES))]
    several = [] if args.quick else [half[:count] for count in AT_ONCE for half in (OBJECTS[::2], OBJECTS[1::2])]
    chosen = [concepts for concepts in [*alone, *several] if args.half in ("both", half_of(concepts))]
    return [(label, concepts) for concepts in chosen for label in args.methods]


def half_of(concepts: list[str]) -> str:
    return "choosing" if CHOOSING.issuperset(concepts) else "reporting"


def table(rows: list[dict]) -> str:
    """Means over concepts with bootstrap intervals over concepts, in Markdown; two judges as `first / second`."""
    lines = [
        "| method | concepts | N | concept left, % | worst concept, % | others, % of base | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row["method"] for row in rows):
        for title, chosen in _parts([row for row in rows if row["method"] == label]):
            left, worst, others = [], [], []
            for judge in chosen[0]["left"]:
                shares = [100 * row["left"][judge] / row["erased_images"] for row in chosen]
                share, row = max(zip(shares, chosen), key=lambda pair: pair[0])
                left.append(_with_interval(shares))
                worst.append(f"{share:.0f}" + (f" {row['concepts'][0]}" if share and len(chosen) > 1 else ""))
                kept = [100 * row["others"][judge] / max(row["others_before"][judge], 1) for row in chosen]
                others.append(_with_interval(kept))
            seconds = statistics.median(row["seconds"] for row in chosen)
            cells = [label, title, len(chosen), *map(" / ".join, (left, worst, others)), f"{seconds:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _parts(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """Objects, groups with styles, and several at once, those for choosing settings apart from those for reporting."""
    parts = {}
    for row in rows:
        concepts = row["concepts"]
        alone = "objects" if concepts[0] in OBJECTS else "groups, styles"
        kind = alone if len(concepts) == 1 else f"{len(concepts)} at once"
        parts.setdefault(f"{kind}, {half_of(concepts)}", []).append(row)
    return sorted(parts.items())


def _with_interval(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    low, high = bootstrap_mean_interval(values)
    return f"{mean} [{low:.1f}, {high:.1f}]"


def main() -> None:
    args = parse_dataclass(AllConceptsArguments, __doc__, check=lambda args: check_claim(args.output_dir))
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "methods", "half")}
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
