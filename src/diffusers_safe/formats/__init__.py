"""What an erasure is saved as and loaded from: our files and those that users of other repositories have."""

from .folders import (
    INDEX,
    MODEL_FOLDERS,
    RESULTS,
    UNET_FOLDER,
    rewrite_index,
    save_model,
    stock_class_name,
    written_aside,
)
from .lora import LoRA, full_rank, low_rank
from .read import FORMATS, ErasedWeights, assign, load_partial, load_unet, plain_parameters, read_erased_weights
from .source import fetch
from .write import LORA_NAME, PARTIAL_NAME, copy_with_facts, facts, save_lora, save_partial, save_whole


__all__ = [
    "FORMATS",
    "INDEX",
    "LORA_NAME",
    "MODEL_FOLDERS",
    "PARTIAL_NAME",
    "RESULTS",
    "UNET_FOLDER",
    "ErasedWeights",
    "LoRA",
    "assign",
    "copy_with_facts",
    "facts",
    "fetch",
    "full_rank",
    "load_partial",
    "load_unet",
    "plain_parameters",
    "low_rank",
    "read_erased_weights",
    "rewrite_index",
    "save_lora",
    "save_model",
    "save_partial",
    "save_whole",
    "stock_class_name",
    "written_aside",
]
