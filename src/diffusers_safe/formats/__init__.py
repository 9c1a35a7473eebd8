"""What an erasure is saved as and loaded from: our files and those that users of other repositories have."""

from .folders import (
    INDEX,
    model_folders,
    result_names,
    rewrite_index,
    save_model,
    stock_class,
    stock_class_name,
    written_aside,
)
from .lora import LoRA, full_rank, kohya_tensors, low_rank
from .read import (
    FORMATS,
    ErasedWeights,
    assign,
    denoiser_folder,
    load_denoiser,
    load_partial,
    plain_parameters,
    read_erased_weights,
)
from .source import fetch
from .write import (
    CHECKPOINT_NAME,
    KOHYA_NAME,
    LORA_NAME,
    PARTIAL_NAME,
    copy_with_facts,
    facts,
    save_lora,
    save_partial,
    save_whole,
)


__all__ = [
    "CHECKPOINT_NAME",
    "FORMATS",
    "INDEX",
    "KOHYA_NAME",
    "LORA_NAME",
    "PARTIAL_NAME",
    "ErasedWeights",
    "LoRA",
    "assign",
    "copy_with_facts",
    "denoiser_folder",
    "facts",
    "fetch",
    "full_rank",
    "kohya_tensors",
    "load_denoiser",
    "load_partial",
    "model_folders",
    "plain_parameters",
    "low_rank",
    "read_erased_weights",
    "result_names",
    "rewrite_index",
    "save_lora",
    "save_model",
    "save_partial",
    "save_whole",
    "stock_class",
    "stock_class_name",
    "written_aside",
]
