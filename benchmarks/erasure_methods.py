"""Compares ESD and SDD: all recipes for the embedded model, trained and evaluated with several seeds.

    python benchmarks/erasure_methods.py --output_dir runs/methods
    python benchmarks/erasure_methods.py --output_dir runs/methods --only emoji-weapon-esd-x --seeds 0

A row is one training run with a recipe of `examples/emoji-*.yaml` and a seed, evaluated on the same prompts and seeds
before and after: how often the judge recognises the erased concept, and how other concepts changed. The table
(Markdown, also in `table.md`) is extended after each row. Finished rows are not repeated.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from erasure_table import Numbers

from diffusers_safe.arguments import option, required
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.emoji.evaluation import evaluate_erasure
from diffusers_safe.emoji.metrics import erased_name
from diffusers_safe.emoji.scenes import GROUPS, OBJECTS, STYLES
from diffusers_safe.generation.models import SteeredModel
from diffusers_safe.messages import exit_with_error
from diffusers_safe.output_folders import check_claim, claimed, write_own
from diffusers_safe.report.statistics import Estimate


EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = {path.stem: path for path in sorted(EXAMPLES.glob("emoji-*.yaml"))}
HEAD = ["| recipe | seed | before | after | others before | change of others | of other styles |", "|---" * 7 + "|"]


@dataclass
class MethodsArguments:
    output_dir: str = required("Folder for all runs. Finished runs are not repeated.")
    only: list[str] = option([], "Names of recipes. Default: all.", RECIPES)
    seeds: list[int] = option([0, 1, 2], "Seed of trainings and images.")
    images_per_prompt: int = option(4, "Images per prompt.", at_least=1)

    def __post_init__(self):
        if bad := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise ValueError(f"seeds {bad}: must be at least 0 and less than 2**32")


def train(recipe: Path, folder: Path, seed: int, threads: int | None = None) -> None:
    """Trains a recipe with a seed, unless the model exists."""
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
        write_own(note, recipe.read_text())
    elif yaml.safe_load(note.read_text()) != yaml.safe_load(recipe.read_text()):
        raise ValueError(f"{folder}: was trained with other settings, see {note}; give another --output_dir")


def erased_by(recipe: Path) -> dict:
    """The concepts that a recipe erases, as arguments of [`evaluate_erasure`]."""
    concepts = yaml.safe_load(recipe.read_text())["concepts"]
    if styles := [style for style in STYLES if any(style in concept for concept in concepts)]:
        return {"erased": [], "style": styles[0]}
    groups = [name for name in concepts if name in GROUPS]
    return {"erased": [name for name in concepts if name in OBJECTS], "group": groups[0] if groups else None}


class Methods:
    """Trainings and their results. Those with the same concept and seed share the original's images and a report."""

    def __init__(self, args: MethodsArguments):
        self._args, self._models = args, {}

    def measure(self, name: str, seed: int) -> Numbers:
        """Trains and evaluates one recipe with one seed."""
        recipe, folder = RECIPES[name], Path(self._args.output_dir)
        model = folder / "models" / f"{name}-{seed}"
        train(recipe, model, seed)
        what = erased_by(recipe)
        concept = f"{erased_name(what['erased'], what.get('style'))}-{seed}".replace(" ", "-")
        models = self._models.setdefault(concept, [SteeredModel("before", str(MODEL_FOLDER))])
        models.append(SteeredModel(name, str(model)))
        images, count = folder / f"images-{self._args.images_per_prompt}" / concept, self._args.images_per_prompt
        return Numbers(evaluate_erasure(models, images, **what, images_per_object=count, seed=seed), name)


def table_row(name: str, seed: int | str, numbers: Numbers) -> str:
    before = numbers.original
    cells = [
        before["concept"],
        numbers["concept"],
        before["others"],
        numbers.change("others"),
        numbers.change("styles"),
    ]
    return f"| {name} | {seed} | {' | '.join(map(str, cells))} |"


def pooled_rate(seeds: list[Numbers]) -> Estimate:
    rates = [one["concept"] for one in seeds]
    return Estimate.rate(sum(round(rate.value * rate.n) for rate in rates), sum(rate.n for rate in rates))


def pooled_row(name: str, seeds: list[Numbers]) -> str:
    """The row of all seeds together: the rate over all images, and the change of other objects averaged over the
    seeds, with a bootstrap over the objects."""
    originals = [one.original for one in seeds]
    before, after = pooled_rate(originals), pooled_rate(seeds)
    changes = [
        (rate.value - original.by_prompt("others")[prompt].value, prompt)
        for one, original in zip(seeds, originals)
        for prompt, rate in one.by_prompt("others").items()
    ]
    others = sum(original["others"].value for original in originals) / len(seeds)
    styles = [found.value for one in seeds if (found := one.change("styles"))]
    change = f"{100 * sum(styles) / len(styles):+.1f} points" if styles else ""
    cells = [before, after, f"{100 * others:.1f} %", Estimate.mean(*map(list, zip(*changes)), "points"), change]
    return f"| **{name}** | all | {' | '.join(map(str, cells))} |"


def main() -> None:
    args = parse_dataclass(MethodsArguments, __doc__, check=lambda args: check_claim(args.output_dir))
    methods, lines = Methods(args), list(HEAD)
    with exit_with_error(), claimed(args.output_dir):
        for name in args.only or RECIPES:
            seeds = []
            for seed in args.seeds:
                seeds.append(methods.measure(name, seed))
                lines.append(table_row(name, seed, seeds[-1]))
                print(lines[-1], file=sys.stderr)
                write_own(Path(args.output_dir) / "table.md", "\n".join(lines) + "\n")
            if len(seeds) > 1:
                lines.append(pooled_row(name, seeds))
                write_own(Path(args.output_dir) / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
