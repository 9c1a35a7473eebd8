"""Erases a concept from the embedded model and compares the model before and after.

The demo runs `diffusers-safe erase` with the method text edit and its default settings, and prints the command. The
model is tiny: the same command on a Stable Diffusion model was not run.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from ..arguments import option, typed
from ..command_line import parse_dataclass
from ..comparison.models import LoadedModel
from ..emoji import MODEL_FOLDER, MODEL_NAME
from ..emoji.evaluation import Erased, evaluate_erasure
from ..emoji.scenes import GROUPS, OBJECTS, STYLES
from ..families import load_pipeline
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, check_claim, check_output_dir, claimed, record_written
from ..report.results import headline_table
from . import erase


def erasure_command(concept: str, output_dir: str | Path) -> list[str]:
    """The arguments of `diffusers-safe erase` that erase a group of emoji with its members, an object, or a style."""
    erased = Erased(concept)
    return [
        *("--method", "text_edit", "--pretrained_model_name_or_path", MODEL_NAME),
        *("--concepts", *erased.concepts),
        *(("--phrasings", "style") if erased.style else ()),
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
    seed: int = option(0, "Seed of the images.", at_least=0, below=2**32)
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
    """Erases, evaluates and writes the report. Replaces an earlier demo of the same concept and seed."""
    started, folder, erased = time.monotonic(), args.folder, Erased(args.concept)
    record_written(folder)
    command = erasure_command(args.concept, folder / "model")
    if (folder / "model").exists():
        command += ["--overwrite", "true"]
    print(f"erasing with\n\n  diffusers-safe erase {shlex.join(command)}\n", flush=True)
    erase.main(command, "diffusers-safe erase")
    places = {"before": MODEL_FOLDER, "after": folder / "model"}
    results = evaluate_erasure(
        [LoadedModel(name, load_pipeline(str(place))) for name, place in places.items()],
        folder / "evaluation",
        erased.objects,
        erased.group,
        erased.style,
        images_per_object=args.images_per_prompt,
        seed=args.seed,
        overwrite=True,
    )
    table = headline_table(results, turned=True)
    print(f"\n{table}\n\nin {time.monotonic() - started:.0f} s; the report with all images:")
    print((folder / "evaluation" / "report.html").resolve().as_uri())
