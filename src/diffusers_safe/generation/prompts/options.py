"""The options of commands that read prompts."""

import inspect
from dataclasses import dataclass, field
from typing import ClassVar

from ...arguments import typed
from ..generate import PromptRow
from .layouts import LAYOUTS
from .read import PROMPT_COLUMN, read_prompts


_LAYOUTS = "; ".join(f"{name}, {layout.description}" for name, layout in LAYOUTS.items())


@typed
@dataclass(kw_only=True)
class PromptOptions:
    """The arguments of [`read_prompts`], as the base of a command's options."""

    TITLE: ClassVar[str] = "prompts"

    prompts: list[str] = field(
        metadata={
            "help": "Prompts; or one .csv, .tsv, .jsonl, .json or .parquet with a column of prompts, .txt with one"
            " prompt in each line, .yaml with `template: An image of {object} in {theme} style.` and a list of words"
            " for each field, folder of a dataset, or id user/name of a dataset on the Hub."
        }
    )
    layout: str | None = field(
        default=None,
        metadata={
            "help": f"How rows are named: {_LAYOUTS}. Default: the first that fits. Seeds,"
            " guidance scales and sizes are read from their columns in every layout."
        },
    )
    prompt_column: str = field(default=PROMPT_COLUMN, metadata={"help": "Column of the prompts."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text around each prompt, such as '{} body'; {name} inserts a column."}
    )
    categories: list[str] = field(default_factory=list, metadata={"help": "Use only rows of at least one of these."})
    max_prompts: int | None = field(
        default=None,
        metadata={"help": "Use only this number: a fixed sample of the whole list; a larger number adds prompts."},
    )
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt, with consecutive seeds."})
    seed: int = field(default=0, metadata={"help": "Seed of a prompt's first image, unless the source has one."})
    row_settings: bool = field(
        default=True, metadata={"help": "Use the guidance scale and size of the rows instead of the options."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    split: str | None = field(default=None, metadata={"help": "Split of a dataset. Default: train."})

    def read_rows(self) -> list[PromptRow]:
        """The images to generate.

        Raises:
            `ValueError`: As [`read_prompts`].
        """
        names = list(inspect.signature(read_prompts).parameters)[1:]
        return read_prompts(self.prompts, **{name: getattr(self, name) for name in names})
