"""The options of commands that read prompts."""

import inspect
from dataclasses import dataclass, field
from typing import ClassVar

from ...arguments import typed
from ..generate import PromptRow
from .layouts import LAYOUTS
from .read import PROMPT_COLUMN, read_prompts


_LAYOUTS = "; ".join(f"{name} = {layout.description}" for name, layout in LAYOUTS.items())


@typed
@dataclass(kw_only=True)
class PromptOptions:
    """The arguments of [`read_prompts`], as the base of a command's options."""

    TITLE: ClassVar[str] = "prompts"

    prompts: list[str] = field(
        metadata={
            "help": "Prompts, or one source of prompts: a .csv, .tsv, .jsonl, .json or .parquet file with a column of"
            " prompts; a .txt file with one prompt per line; a .yaml file with `template: An image of {object} in"
            " {theme} style.` and a list of words for each field; the folder of a dataset; or a dataset on the Hub,"
            " user/name."
        }
    )
    layout: str | None = field(
        default=None,
        metadata={
            "help": f"Format of the list, which determines the names of images: {_LAYOUTS}. Default: the first that"
            " fits. Seeds, guidance scales and sizes are read from their columns in every format."
        },
    )
    prompt_column: str = field(default=PROMPT_COLUMN, metadata={"help": "Column of the prompts."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text around each prompt, such as '{} body'. {NAME} inserts the column NAME."}
    )
    categories: list[str] = field(default_factory=list, metadata={"help": "Use only rows of these categories."})
    max_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of prompts, a fixed random sample of the list. A larger number adds prompts to the"
            " sample."
        },
    )
    images_per_prompt: int = field(
        default=1, metadata={"help": "Number of images per prompt, with consecutive seeds."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the first image of a prompt, if the list has no seeds."})
    row_settings: bool = field(
        default=True,
        metadata={"help": "Use the guidance scales and sizes of the list, if it has any, instead of the options."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a dataset on the Hub, if it has several."}
    )
    split: str | None = field(default=None, metadata={"help": "Split of a dataset. Default: train."})

    def read_rows(self) -> list[PromptRow]:
        """The images to generate.

        Raises:
            `ValueError`: As [`read_prompts`].
        """
        names = list(inspect.signature(read_prompts).parameters)[1:]
        return read_prompts(self.prompts, **{name: getattr(self, name) for name in names})
