"""Where the prompts of an evaluation come from: lists, tables and datasets in the layouts that others published."""

from .layouts import LAYOUTS, Layout
from .options import PromptOptions
from .read import read_prompts
from .recorded import recorded_inappropriateness


__all__ = ["LAYOUTS", "Layout", "PromptOptions", "read_prompts", "recorded_inappropriateness"]
