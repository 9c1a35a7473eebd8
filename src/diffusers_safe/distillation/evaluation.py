"""The evaluation at the end of a training: its models compared, as by `diffusers-safe evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..arguments import build_options
from ..command_line import read_config
from ..comparison.evaluate import evaluate
from ..comparison.models import ModelSource
from ..comparison.options import EvaluationOptions
from ..families import load_pipeline
from ..generation.generate import GenerationSettings
from ..metrics import make_metrics
from ..report.results import headline_table


FOLDER = "evaluation"  # in the output folder, where cards look for it


@dataclass(frozen=True)
class StoredPipeline:
    """A model that is loaded when its turn comes.

    Attributes:
        name (`str`): What tables call it.
        model (`str`): Folder or Hub id.
        hub_arguments (`dict`): Of `from_pretrained`.
    """

    name: str
    model: str
    hub_arguments: dict = field(default_factory=dict)

    def load(self, settings: GenerationSettings) -> tuple[DiffusionPipeline, GenerationSettings]:
        return load_pipeline(self.model, **self.hub_arguments).to(PartialState().device), settings


def read_evaluation(path: str) -> EvaluationOptions:
    """The options of a YAML file: those of `diffusers-safe evaluate` without models and folder.

    Raises:
        `ValueError`: If it cannot be read, or something is wrong with it.
    """
    try:
        return build_options(EvaluationOptions, read_config(path, EvaluationOptions))
    except ValueError as error:
        raise ValueError(f"evaluation {path}: {error}") from None


class FinalEvaluation:
    """Prompts and metrics, ready before a training begins.

    Args:
        path (`str`): As [`read_evaluation`] takes it.

    Raises:
        `ValueError`: If prompts cannot be read, or a metric lacks something.
    """

    def __init__(self, path: str):
        self.options = read_evaluation(path)
        self.rows = self.options.read_rows()
        self.metrics = make_metrics(self.options.metrics, self.options)

    def report(self, models: list[ModelSource], output_dir: str | Path) -> None:
        """Compares models, the first the original, writes the report below a training's output folder, and prints the
        table. Called on every process."""
        folder = Path(output_dir) / FOLDER
        with torch.inference_mode():
            results = evaluate(
                models,
                self.rows,
                self.metrics,
                folder,
                prompts=self.options.source,
                overwrite=True,  # the folder is the run's own
                **self.options.shown,
            )
        if results:  # of all processes one measures
            print(f"\n{headline_table(results)}\n")
