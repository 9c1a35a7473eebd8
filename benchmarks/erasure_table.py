"""A table that compares ways to remove a concept from an embedded model: erasure against retention."""

from collections.abc import Sequence
from pathlib import Path

from diffusers_safe.comparison.models import LoadedModel
from diffusers_safe.emoji.evaluation import SETTINGS, Erased, evaluate_erasure
from diffusers_safe.generation.rows import GenerationSettings
from diffusers_safe.output_folders import write_own
from diffusers_safe.report.statistics import Estimate


def erasure_table(
    models: Sequence[LoadedModel],
    folder: str | Path,
    images_per_prompt: int,
    seed: int,
    settings: GenerationSettings = SETTINGS,
    concept: str = "weapon",
) -> str:
    """Evaluates models on the same prompts and seeds. Existing images are used again.

    Args:
        models (`Sequence[LoadedModel]`): The models; the first is the original.
        folder (`str` or `Path`): Folder for the images, the report of all models, and `table.md`.
        images_per_prompt (`int`): Images per prompt.
        seed (`int`): Seed from which the seeds of all images are derived.
        settings (`GenerationSettings`, *optional*): Sampling settings.
        concept (`str`, defaults to `"weapon"`): What is removed, as in [`Erased`].

    Returns:
        `str`: The table in Markdown.

    Raises:
        `ValueError`: If the folder contains images of other models or settings.
    """
    erased = Erased(concept)
    results = evaluate_erasure(
        models,
        folder,
        erased.objects,
        erased.group,
        erased.style,
        images_per_object=images_per_prompt,
        seed=seed,
        settings=settings,
    )
    lines = [f"| | {concept} recognised | others recognised | change of others |", "|---" * 4 + "|"]
    for model in models:
        numbers = Numbers(results, model.name)
        cells = [numbers["concept"], numbers["others"], numbers.change("others")]
        lines.append(f"| {model.name} | {' | '.join(map(str, cells))} |")
    table = "\n".join(lines) + "\n"
    write_own(Path(folder) / "table.md", table)
    return table


class Numbers:
    """The results of [`evaluate_erasure`] for one model: rates of recognition by the judge, and their changes.

    Args:
        results (`dict`): Results of the evaluation.
        model (`str`): Name of the model.
    """

    def __init__(self, results: dict, model: str):
        self._model, self._found = model, results["metrics"]["emoji_recognition"]

    def __getitem__(self, name: str) -> Estimate:
        return Estimate(**self._found["estimates"][self._model][name])

    def change(self, name: str) -> Estimate | str:
        """The difference to the original on the same prompts and seeds; `""` if it was not measured."""
        change = self._found["differences"].get(self._model, {}).get(name)
        return Estimate(**change["estimate"]) if change else ""
