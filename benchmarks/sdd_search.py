"""The search for SDD settings that erase without destroying, on the embedded model.

    python benchmarks/sdd_search.py --output_dir runs/search

Every row is one run of `train_sdd.py` that erases "weapon" with all its members, then the evaluation of the demo. The
table (Markdown, also in `table.md`) shows erasure beside retention. Finished rows are kept when it is run again.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import StableDiffusionPipeline

from diffusers_safe.arguments import parse_dataclass
from diffusers_safe.emoji import CLASSIFIER_FOLDER, MODEL_FOLDER
from diffusers_safe.emoji.classifier import EmojiClassifier
from diffusers_safe.emoji.demo import erasure_command
from diffusers_safe.emoji.evaluation import evaluate_erasure
from diffusers_safe.emoji.scenes import group_members
from diffusers_safe.evaluation.statistics import Estimate
from diffusers_safe.provenance import write_text


GROUP = "weapon"
PAPER = {"prompt_order": "paper", "sdd_target": "student", "retain_weight": 0.0}
VARIANTS = {
    "demo": {},
    "the paper's rule": PAPER,
    "the paper's rule, frozen target": {**PAPER, "sdd_target": "frozen"},
    "the repository's prompt order": {"prompt_order": "repository"},
    "the paper's prompt order, retention": {"prompt_order": "paper"},
    "matched prompts, no retention": {"retain_weight": 0.0},
    "matched prompts, student target, retention": {"sdd_target": "student"},
    "retention x 3": {"retain_weight": 3.0},
    "half the learning rate": {"learning_rate": 1e-4},
    "twice the learning rate": {"learning_rate": 4e-4},
    "keys and values only": {"train_method": "xattn-strict"},
    "noxattn": {"train_method": "noxattn"},
}


@dataclass
class SearchArguments:
    output_dir: str = field(metadata={"help": "Folder for all runs; finished ones are kept."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of rows; default all."})
    images_per_prompt: int = field(default=4, metadata={"help": "Images of each prompt."})
    train_seed: int = field(default=0, metadata={"help": "Seed of the trainings."})
    image_seed: int = field(default=0, metadata={"help": "Seed of the images."})
    model: str = field(default=str(MODEL_FOLDER), metadata={"help": "The model to erase from."})
    classifier: str = field(default=str(CLASSIFIER_FOLDER), metadata={"help": "The judge."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Steps of every run; default the demo's."})

    def __post_init__(self):
        if unknown := [name for name in self.only if name not in VARIANTS]:
            raise ValueError(f"only {unknown}: unknown; allowed are {', '.join(VARIANTS)}")


def run_variant(name: str, changes: dict, args: SearchArguments) -> dict:
    folder = Path(args.output_dir) / f"{name.replace(' ', '-')}-{args.train_seed}"
    results_file = folder / f"evaluation-{args.image_seed}" / "results.json"
    if not results_file.exists():
        changes = changes if args.max_train_steps is None else {**changes, "max_train_steps": args.max_train_steps}
        # A later option on the command line wins.
        options = [word for option, value in changes.items() for word in (f"--{option}", str(value))]
        if not (folder / "model" / "model_index.json").exists():
            command = erasure_command(args.model, GROUP, folder / "model", args.train_seed) + options
            subprocess.run(command, check=True)
        before = Path(args.output_dir) / f"before-{args.image_seed}-{args.images_per_prompt}"
        before.mkdir(exist_ok=True)
        results_file.parent.mkdir(parents=True, exist_ok=True)
        if not (results_file.parent / "before").exists():
            (results_file.parent / "before").symlink_to(before.resolve())
        evaluate_erasure(
            StableDiffusionPipeline.from_pretrained(args.model),
            StableDiffusionPipeline.from_pretrained(folder / "model"),
            group_members(GROUP),
            EmojiClassifier.from_pretrained(args.classifier),
            results_file.parent,
            args.images_per_prompt,
            args.image_seed,
            GROUP,
        )
    return json.loads(results_file.read_text())


def readable(estimate: dict) -> str:
    return str(Estimate(**estimate))


def main() -> None:
    args = parse_dataclass(SearchArguments, __doc__)
    lines = ["| settings | weapon recognised | others recognised | change |", "|---|---|---|---|"]
    for name in args.only or VARIANTS:
        results = run_variant(name, VARIANTS[name], args)
        rate, accuracy = results["concept_rate"], results["accuracy"]
        if len(lines) == 2:
            lines.append(f"| before | {readable(rate['before'])} | {readable(accuracy['before'])} | |")
        cells = (rate["after"], accuracy["after"], accuracy["difference"])
        lines.append(f"| {name} | {' | '.join(map(readable, cells))} |")
        print(lines[-1], file=sys.stderr)
    table = "\n".join(lines) + "\n"
    write_text(Path(args.output_dir) / "table.md", table)
    print(table)


if __name__ == "__main__":
    main()
