"""The options of commands that read prompts."""

import inspect
from dataclasses import dataclass, field

from ...arguments import typed
from ..generate import PromptRow
from .layouts import LAYOUTS
from .read import PROMPT_COLUMN, read_prompts


_LAYOUTS = "; ".join(f"{name}, {layout.description}" for name, layout in LAYOUTS.items())


@typed
@dataclass(kw_only=True)
class PromptOptions:
    """What [`read_prompts`] takes, for a command's dataclass to begin with."""

    prompts: list[str] = field(
        metadata={
            "help": "Prompts; or one .csv, .tsv, .jsonl, .json or .parquet with a column of prompts, .txt with a"
            " prompt a line, .yaml with `template: An image of {object} in {theme} style.` and a list of words for"
            " each field, folder of a dataset, or id user/name of a dataset on the Hub."
        }
    )
    layout: str | None = field(
        default=None,
        metadata={
            "help": f"How its rows are named: {_LAYOUTS}. Default: the first that fits. Seeds,"
            " guidance scales and sizes are read from their columns in each."
        },
    )
    prompt_column: str = field(default=PROMPT_COLUMN, metadata={"help": "Where the prompts are."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text around each prompt, such as '{} body'; {name} stands for a column."}
    )
    categories: list[str] = field(default_factory=list, metadata={"help": "Only rows of at least one of these."})
    max_prompts: int | None = field(
        default=None,
        metadata={"help": "Only so many: always the same ones, drawn over the whole list; a larger number adds more."},
    )
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt, with seeds one apart."})
    seed: int = field(default=0, metadata={"help": "Seed of a prompt's first image, unless the source gives one."})
    row_settings: bool = field(
        default=True, metadata={"help": "Let a row's own guidance scale and size count; else those given here."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Of a dataset on the Hub."})
    split: str | None = field(default=None, metadata={"help": "Of a dataset; default train."})

    def read_rows(self) -> list[PromptRow]:
        """The images to generate.

        Raises:
            `ValueError`: As [`read_prompts`].
        """
        names = list(inspect.signature(read_prompts).parameters)[1:]
        return read_prompts(self.prompts, **{name: getattr(self, name) for name in names})
