"""ESD and SDD beside each other: every recipe for the embedded model, trained and measured with several seeds.

    python benchmarks/erasure_methods.py --output_dir runs/methods
    python benchmarks/erasure_methods.py --output_dir runs/methods --only emoji-weapon-esd-x --seeds 0

A row is one training by `examples/emoji-*.yaml` with a seed, then the same prompts and seeds before and after: how
often the judge still sees what was erased, and what that cost others. The table (Markdown, also in `table.md`) grows
row by row; finished rows are kept when it is run again.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from diffusers import StableDiffusionPipeline

from diffusers_safe.arguments import check_output_dir, parse_dataclass, told_in_one_line
from diffusers_safe.emoji import CLASSIFIER_FOLDER, MODEL_FOLDER
from diffusers_safe.emoji.classifier import EmojiClassifier
from diffusers_safe.emoji.evaluation import evaluate_erasure
from diffusers_safe.emoji.scenes import GROUPS, OBJECTS, STYLES
from diffusers_safe.evaluation.statistics import Estimate
from diffusers_safe.provenance import write_text


EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = {path.stem: path for path in sorted(EXAMPLES.glob("emoji-*.yaml"))}
HEAD = ["| recipe | seed | before | after | others before | change of others | of other styles |", "|---" * 7 + "|"]


@dataclass
class MethodsArguments:
    output_dir: str = field(metadata={"help": "Folder for all runs; finished ones are kept."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of recipes; default all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of trainings and images."})
    images_per_prompt: int = field(default=4, metadata={"help": "Images of each prompt."})

    def __post_init__(self):
        if unknown := [name for name in self.only if name not in RECIPES]:
            raise ValueError(f"only {unknown}: unknown; allowed are {', '.join(RECIPES)}")
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt {self.images_per_prompt}: must be at least 1")
        if bad := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise ValueError(f"seeds {bad}: must be at least 0 and less than 2**32")


def train(recipe: Path, folder: Path, seed: int, threads: int | None = None) -> None:
    """Trains by a recipe with a seed, unless the model is there."""
    threads = threads or torch.get_num_threads()
    note = folder.with_suffix(".yaml")
    if not (folder / "model_index.json").exists():
        script = re.search(r"train_(\w+)\.py", recipe.read_text())[1]
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"),
            *("--num_cpu_threads_per_process", str(threads), "--mixed_precision", "no"),
            *("--num_machines", "1", "--dynamo_backend", "no", "-m", f"diffusers_safe.training.{script}"),
            *("--config", str(recipe), "--pretrained_model_name_or_path", str(MODEL_FOLDER)),
            *("--output_dir", str(folder), "--seed", str(seed), "--checkpointing_steps", "0"),
            *("--validation_steps", "100000"),
        ]
        if code := subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode:
            raise SystemExit(code)
        write_text(note, recipe.read_text())
    elif note.read_text() != recipe.read_text():
        raise ValueError(f"{folder}: was trained with other settings, see {note}; give another --output_dir")


def erased_by(recipe: Path) -> dict:
    """What a recipe erases, as [`evaluate_erasure`] takes it."""
    concepts = yaml.safe_load(recipe.read_text())["concepts"]
    if styles := [style for style in STYLES if any(style in concept for concept in concepts)]:
        return {"erased": [], "style": styles[0]}
    groups = [name for name in concepts if name in GROUPS]
    return {"erased": [name for name in concepts if name in OBJECTS], "group": groups[0] if groups else None}


def measure(name: str, seed: int, args: MethodsArguments, stock: StableDiffusionPipeline) -> dict:
    """The results of one training."""
    recipe, folder = RECIPES[name], Path(args.output_dir)
    model = folder / "models" / f"{name}-{seed}"
    train(recipe, model, seed)
    after = StableDiffusionPipeline.from_pretrained(model)
    what = erased_by(recipe)
    subject = what.get("style") or what["group"] or "-".join(what["erased"])
    images = folder / f"images-{args.images_per_prompt}"
    row, shared = images / f"{name}-{seed}", images / f"before-{subject}-{seed}"
    for each in (row, shared):
        each.mkdir(parents=True, exist_ok=True)
    if not (row / "before").exists():
        (row / "before").symlink_to(shared.resolve())
    return evaluate_erasure(
        stock, after, classifier=EmojiClassifier.from_pretrained(CLASSIFIER_FOLDER), folder=row,
        images_per_object=args.images_per_prompt, seed=seed, **what,
    )  # fmt: skip


def table_row(name: str, seed: int | str, results: dict) -> str:
    rate, others, styles = results["concept_rate"], results["accuracy"], results["style_accuracy"]
    cells = [rate["before"], rate["after"], others["before"], others["difference"]]
    return f"| {name} | {seed} | {' | '.join(map(str, cells))} | {styles['difference'] if styles else ''} |"


def pooled_row(name: str, seeds: list[dict]) -> str:
    """The seeds together: a rate over all images, and the change of each other object averaged over the seeds, its
    interval a bootstrap over the objects."""
    rates = {
        side: Estimate.rate(
            sum(round(one["concept_rate"][side].value * one["concept_rate"][side].n) for one in seeds),
            sum(one["concept_rate"][side].n for one in seeds),
        )
        for side in ("before", "after")
    }

    def others(value) -> Estimate:
        rows = [(value(sides), subject) for one in seeds for subject, sides in one["accuracy_by_object"].items()]
        return Estimate.mean(*map(list, zip(*rows)), "points")

    change = others(lambda sides: sides["after"].value - sides["before"].value)
    means = {
        part: sum(one[part][key].value for one in seeds) / len(seeds) if all(one[part] for one in seeds) else None
        for part, key in (("accuracy", "before"), ("style_accuracy", "difference"))
    }
    styles = "" if means["style_accuracy"] is None else f"{100 * means['style_accuracy']:+.1f} points"
    told = [rates["before"], rates["after"], f"{100 * means['accuracy']:.1f} %", change, styles]
    return f"| **{name}** | all | {' | '.join(map(str, told))} |"


def main() -> None:
    args = parse_dataclass(MethodsArguments, __doc__, check=lambda args: check_output_dir(args.output_dir))
    stock = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER)
    lines = list(HEAD)
    with told_in_one_line():
        for name in args.only or RECIPES:
            seeds = []
            for seed in args.seeds:
                seeds.append(measure(name, seed, args, stock))
                lines.append(table_row(name, seed, seeds[-1]))
                print(lines[-1], file=sys.stderr)
                write_text(Path(args.output_dir) / "table.md", "\n".join(lines) + "\n")
            if len(seeds) > 1:
                lines.append(pooled_row(name, seeds))
                write_text(Path(args.output_dir) / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
