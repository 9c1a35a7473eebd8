"""A table of ways to keep the group "weapon" out of the embedded model: erasure beside retention."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline

from diffusers_safe.comparison.models import LoadedModel
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.emoji.demo import erasure_command
from diffusers_safe.emoji.evaluation import evaluate_erasure
from diffusers_safe.emoji.scenes import group_members
from diffusers_safe.output_folders import write_own
from diffusers_safe.report.statistics import Estimate


GROUP = "weapon"


def demo_command(folder: Path, seed: int, changes: dict) -> list[str]:
    """The command of the demo's training, with other values of some options."""
    # A later option on the command line wins.
    options = [word for option, value in changes.items() for word in (f"--{option}", str(value))]
    return erasure_command(MODEL_FOLDER, GROUP, folder, seed) + options


def demo_options(folder: Path, seed: int, changes: dict) -> list[str]:
    """The options of [`demo_command`] alone; they do not say how many threads compute."""
    command = demo_command(folder, seed, changes)
    return command[command.index("diffusers_safe.training.sdd") + 1 :]


def train_demo(folder: Path, seed: int, changes: dict) -> StableDiffusionPipeline:
    """The model of the demo's training with other values of some options; trained unless it is there.

    Raises:
        `ValueError`: If the model that is there was trained with other options.
    """
    note, settings = folder.with_suffix(".txt"), shlex.join(demo_options(folder, seed, changes))
    if not (folder / "model_index.json").exists():
        if code := subprocess.run(demo_command(folder, seed, changes)).returncode:
            raise SystemExit(code)
        write_own(note, settings)
    elif note.read_text() != settings:
        raise ValueError(f"{folder}: was trained with other settings, see {note}; give another --output_dir")
    return StableDiffusionPipeline.from_pretrained(folder)


def erasure_table(
    models: Sequence[LoadedModel],
    folder: str | Path,
    images_per_prompt: int,
    seed: int,
    retained: list[str] | None = None,
) -> str:
    """Every row draws the same prompts with the same seeds. Images are kept: what is there is not drawn again, and if
    it is of another model or other settings, that is a `ValueError`.

    Args:
        models (`Sequence[LoadedModel]`): The first is the model without any change.
        folder (`str` or `Path`): For images, the report of all models, and `table.md`.
        images_per_prompt (`int`): Images of each prompt.
        seed (`int`): Every image's own seed follows from it.
        retained (`list[str]`, *optional*): What trainings name as to be kept. A column more then tells the change of
            the objects that they do not name.
    """
    results = evaluate_erasure(
        models, folder, group_members(GROUP), GROUP, retained=retained, images_per_object=images_per_prompt, seed=seed
    )
    unnamed = " | change of those that training did not name" if retained else ""
    lines = [f"| | weapon recognised | others recognised | change of others{unnamed} |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for model in models:
        numbers = Numbers(results, model.name)
        cells = [numbers["concept"], numbers["others"], numbers.change("others")]
        if retained:
            cells.append(numbers.change("unnamed"))
        lines.append(f"| {model.name} | {' | '.join(map(str, cells))} |")
    table = "\n".join(lines) + "\n"
    write_own(Path(folder) / "table.md", table)
    return table


class Numbers:
    """What [`evaluate_erasure`] found of a model: quantities of the judge's recognition, and their changes.

    Args:
        results (`dict`): Of an evaluation.
        model (`str`): Its name.
    """

    def __init__(self, results: dict, model: str):
        self._results, self._model = results, model
        self._found = results["metrics"]["emoji_recognition"]

    @property
    def original(self) -> "Numbers":
        """Those of the first model."""
        return Numbers(self._results, self._results["protocol"]["original"])

    def __getitem__(self, name: str) -> Estimate:
        return Estimate(**self._found["estimates"][self._model][name])

    def change(self, name: str) -> Estimate | str:
        """Against the first model on the same prompts and seeds; `""` of that itself, and of what was not asked."""
        change = self._found["differences"].get(self._model, {}).get(name)
        return Estimate(**change["estimate"]) if change else ""

    def by_prompt(self, name: str) -> dict[str, Estimate]:
        found = self._found["by_prompt"][self._model][name]
        return {prompt: Estimate(**estimate) for prompt, estimate in found.items()}
