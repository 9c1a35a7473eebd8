"""Sources of prompts: lists, tables and datasets in published layouts."""

from .layouts import LAYOUTS, Layout
from .options import PromptOptions
from .read import read_prompts
from .recorded import recorded_inappropriateness


__all__ = ["LAYOUTS", "Layout", "PromptOptions", "read_prompts", "recorded_inappropriateness"]
