"""The search for SDD settings that erase without destroying, on the embedded model.

    python benchmarks/sdd_search.py --output_dir runs/search

Every row is one run of `train_sdd.py` that erases "weapon" with all its members, then the evaluation of the demo. The
table (Markdown, also in `table.md`) shows erasure beside retention. Finished rows are kept when it is run again.
"""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import StableDiffusionPipeline
from erasure_table import GROUP, ErasureTable

from diffusers_safe.arguments import parse_dataclass
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.emoji.demo import erasure_command


PAPER = {"prompt_order": "paper", "sdd_target": "student", "sampling_fraction": 1.0, "retain_weight": 0.0}
VARIANTS = {
    "demo": {},
    "the paper's rule": PAPER,
    "the paper's rule, frozen target": {**PAPER, "sdd_target": "frozen"},
    "the whole schedule": {"sampling_fraction": 1.0},
    "the repository's prompt order": {"prompt_order": "repository"},
    "the paper's prompt order": {"prompt_order": "paper"},
    "student target": {"sdd_target": "student"},
    "no retention": {"retain_weight": 0.0},
    "half the learning rate": {"learning_rate": 5e-4},
    "twice the learning rate": {"learning_rate": 2e-3},
    "keys and values only": {"train_method": "xattn-strict"},
    "all but cross-attention": {"train_method": "noxattn"},
}


@dataclass
class SearchArguments:
    output_dir: str = field(metadata={"help": "Folder for all runs; finished ones are kept."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of rows; default all."})
    images_per_prompt: int = field(default=4, metadata={"help": "Images of each prompt."})
    train_seed: int = field(default=0, metadata={"help": "Seed of the trainings."})
    image_seed: int = field(default=0, metadata={"help": "Seed of the images."})

    def __post_init__(self):
        if unknown := [name for name in self.only if name not in VARIANTS]:
            raise ValueError(f"only {unknown}: unknown; allowed are {', '.join(VARIANTS)}")


def train(name: str, args: SearchArguments) -> StableDiffusionPipeline:
    """The model of a row; trained unless it is there."""
    folder = Path(args.output_dir) / f"{name.replace(' ', '-')}-{args.train_seed}"
    if not (folder / "model_index.json").exists():
        # A later option on the command line wins.
        options = [word for option, value in VARIANTS[name].items() for word in (f"--{option}", str(value))]
        subprocess.run(erasure_command(MODEL_FOLDER, GROUP, folder, args.train_seed) + options, check=True)
    return StableDiffusionPipeline.from_pretrained(folder)


def main() -> None:
    args = parse_dataclass(SearchArguments, __doc__)
    stock = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER)
    folder = Path(args.output_dir) / f"trained-{args.train_seed}"
    table = ErasureTable(folder, stock, args.images_per_prompt, args.image_seed)
    for name in args.only or VARIANTS:
        table.add(name, train(name, args))
    print("\n".join(table.lines))


if __name__ == "__main__":
    main()
