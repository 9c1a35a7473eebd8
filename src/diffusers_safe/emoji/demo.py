"""Erases a concept from the embedded model and compares the model before and after.

The demo runs the same training as train_sdd.py and prints the command. Its settings were tuned for the small embedded
model. For another model, start from the defaults of train_sdd.py, which are the paper's.
"""

import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..arguments import option, typed
from ..command_line import parse_dataclass
from ..comparison.models import LoadedModel
from ..families import load_pipeline
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, check_claim, check_output_dir, claimed, record_written
from ..report.results import headline_table
from . import MODEL_FOLDER, MODEL_NAME
from .evaluation import Erased, evaluate_erasure
from .scenes import GROUP_OF, GROUPS, OBJECTS, STYLES, group_members


# docs/methods.md explains them; benchmarks/sdd_ablation.py changes one at a time.
SETTINGS = {
    "train_method": "xattn",
    "prompt_order": "matched",
    "sdd_target": "frozen",
    "retain_unconditional": True,
    "loss_space": "velocity",
    "num_inference_steps": 25,
    "sampling_fraction": 0.4,
    "latents_per_trajectory": 2,
    "trajectory_pool": 120,
    "max_train_steps": 140,
    "train_batch_size": 8,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "ema_decay": 0.9,
    "retain_weight": 3.0,
}
# Differences for an object and a style, as in examples/emoji-cat-sdd.yaml and emoji-sketch-sdd.yaml.
OBJECT_SETTINGS = {"max_train_steps": 80, "learning_rate": 1e-3}
STYLE_SETTINGS = {"max_train_steps": 100, "negative_guidance_scale": 0.25}


def erased_concepts(concept: str) -> list[str]:
    """The concepts to train on: a group and its members, an object, or a style."""
    erased = Erased(concept)
    return [f"{concept} style"] if erased.style else [*erased.objects, *([concept] if erased.group else [])]


def retained_prompts(concept: str) -> list[str]:
    """The prompts to retain: the other groups and every second object of each; for a style, also the other styles. The
    evaluation measures the remaining objects separately."""
    erased = Erased(concept)
    styles = [f"{style} style" for style in STYLES if erased.style and style != concept]
    groups = [group for group in GROUPS if group != concept]
    return [*styles, *groups, *(name for group in groups for name in group_members(group)[::2] if name != concept)]


def target_prompt(concept: str) -> str:
    """The prompt that replaces an erased group or object: the largest of the other groups."""
    own = GROUP_OF.get(concept, concept)
    return max((other for other in GROUPS if other != own), key=lambda other: len(group_members(other)))


def erasure_command(model: str | Path, concept: str, output_dir: str | Path, seed: int) -> list[str]:
    """The command line that erases a group of emoji, an object or a style."""
    erased = Erased(concept)
    own = STYLE_SETTINGS if erased.style else {"target_prompt": target_prompt(concept)}
    options = {**SETTINGS, **({} if erased.group or erased.style else OBJECT_SETTINGS), **own}
    options |= {"checkpointing_steps": 0, "seed": seed}
    return [
        *(sys.executable, "-m", "diffusers_safe.training.sdd"),
        *("--pretrained_model_name_or_path", str(model)),
        *("--concepts", *erased_concepts(concept)),
        *("--retain_prompts", *retained_prompts(concept)),
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        *("--output_dir", str(output_dir)),
    ]


@typed
@dataclass
class DemoArguments:
    output_dir: str = option("runs/demo", "Folder for the model, the images and the report.")
    concept: str = option(
        "weapon",
        f"What to erase: a group of emoji ({', '.join(GROUPS)}), an object such as banana, or a style "
        f"({', '.join(STYLES)}).",
        [*GROUPS, *OBJECTS, *STYLES],
    )
    group: str | None = option(None, "Deprecated name of --concept.", [*GROUPS, None])
    seed: int = option(0, "Seed of the training and of the images.", at_least=0, below=2**32)
    overwrite: bool = option(False, OVERWRITE_HELP)
    images_per_prompt: int = option(3, "Number of images per prompt, before and after the erasure.", at_least=1)

    def __post_init__(self):
        if self.group is not None and self.concept not in ("weapon", self.group):
            raise ValueError(
                f"group {self.group}: is a deprecated name of concept, which is {self.concept}; give only one"
            )
        self.concept = self.group or self.concept

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / f"{self.concept}-{self.seed}"

    @property
    def claim(self) -> dict:
        parts = ("model", "evaluation")
        run = {"group": self.concept, "seed": self.seed}
        return {"kind": "demo", "run": run, "continues": parts, "overwrite": self.overwrite}


def check_surroundings(args: DemoArguments) -> None:
    check_output_dir(args.output_dir)
    check_claim(args.folder, **args.claim)


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(DemoArguments, __doc__, argv, prog, check_surroundings)
    with exit_with_error(), claimed(args.folder, **args.claim):
        run(args)


def run(args: DemoArguments) -> None:
    """Trains, evaluates and writes the report. Replaces an earlier demo of the same concept and seed."""
    started, folder, erased = time.monotonic(), args.folder, Erased(args.concept)
    record_written(folder)
    command = erasure_command(MODEL_NAME, args.concept, folder / "model", args.seed)
    if (folder / "model").exists():
        command += ["--overwrite", "true"]
    print(f"erasing with\n\n  {shlex.join(command)}\n", flush=True)
    if code := _run(command):
        raise SystemExit(code)
    places = {"before": MODEL_FOLDER, "after": folder / "model"}
    results = evaluate_erasure(
        [LoadedModel(name, load_pipeline(str(place))) for name, place in places.items()],
        folder / "evaluation",
        erased.objects,
        erased.group,
        erased.style,
        retained=retained_prompts(args.concept),
        images_per_object=args.images_per_prompt,
        seed=args.seed,
        overwrite=True,
    )
    table = headline_table(results, turned=True)
    print(f"\n{table}\n\nin {time.monotonic() - started:.0f} s; the report with all images:")
    print((folder / "evaluation" / "report.html").resolve().as_uri())


def _run(command: list[str]) -> int:
    """Runs a program and returns its exit code, as shells count it. The program is terminated if this process is, and
    does not outlive a Ctrl-C."""
    with subprocess.Popen(command) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            code = child.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
