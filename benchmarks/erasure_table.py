"""A table of ways to keep the group "weapon" out of the embedded model: erasure beside retention."""

import shlex
import subprocess
import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline

from diffusers_safe.emoji import CLASSIFIER_FOLDER, MODEL_FOLDER
from diffusers_safe.emoji.classifier import EmojiClassifier
from diffusers_safe.emoji.demo import erasure_command
from diffusers_safe.emoji.evaluation import evaluate_erasure
from diffusers_safe.emoji.scenes import group_members
from diffusers_safe.evaluation.generate import GenerationSettings
from diffusers_safe.provenance import write_text


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
        write_text(note, settings)
    elif note.read_text() != settings:
        raise ValueError(f"{folder}: was trained with other settings, see {note}; give another --output_dir")
    return StableDiffusionPipeline.from_pretrained(folder)


class ErasureTable:
    """Every row draws the same prompts with the same seeds. Images are kept: what is there is not drawn again, and
    if it is of another model or other settings, that is a `ValueError`.

    Args:
        folder (`str`): For all images, a folder a row, and `table.md`.
        before ([`~diffusers.StableDiffusionPipeline`]): The model without any change, the first row.
        images_per_prompt (`int`): Images of each prompt.
        seed (`int`): Every image's own seed follows from it.
        retained (`list[str]`, *optional*): What trainings name as to be kept. A column more then tells the change of
            the objects that they do not name.
    """

    def __init__(
        self,
        folder: str,
        before: StableDiffusionPipeline,
        images_per_prompt: int,
        seed: int,
        retained: list[str] | None = None,
    ):
        self.folder = Path(folder) / f"images-{images_per_prompt}-{seed}"
        self._before, self._images_per_prompt, self._seed = before, images_per_prompt, seed
        self._retained = retained
        self._classifier = EmojiClassifier.from_pretrained(CLASSIFIER_FOLDER)
        unnamed = " | change of those that training did not name" if retained else ""
        self.lines = [f"| | weapon recognised | others recognised | change of others{unnamed} |"]
        self.lines.append("|---" * (self.lines[0].count("|") - 1) + "|")

    def add(self, name: str, after: StableDiffusionPipeline, settings_after: GenerationSettings | None = None) -> None:
        """Measures one way, and prints its row."""
        row, shared = self.folder / name.replace(" ", "-"), self.folder / "before"
        for each in (row, shared):
            each.mkdir(parents=True, exist_ok=True)
        if not (row / "before").exists():
            (row / "before").symlink_to(shared.resolve())
        results = evaluate_erasure(
            self._before, after, group_members(GROUP), self._classifier, row,
            self._images_per_prompt, self._seed, GROUP, settings_after=settings_after, retained=self._retained,
        )  # fmt: skip
        rate, accuracy = results["concept_rate"], results["accuracy"]
        if len(self.lines) == 2:
            self.lines.append(f"| before | {rate['before']} | {accuracy['before']} | |{' |' * bool(self._retained)}")
        cells = [rate["after"], accuracy["after"], accuracy["difference"]]
        if self._retained:
            cells.append(results["accuracy_unnamed"]["difference"])
        self.lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
        print(self.lines[-1], file=sys.stderr)
        write_text(self.folder / "table.md", "\n".join(self.lines) + "\n")
