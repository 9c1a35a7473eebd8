"""Publishes erased models and students on the Hugging Face Hub: the model card and the push."""

from .base import Base, find_base
from .contents import as_published, check_folder, published_record
from .model_cards import erasure_card, student_card
from .model_index import check_evaluation, eval_results, write_benchmark
from .push import (
    PUSH_FAILED,
    RETRY_WAITS,
    PushError,
    check_model_id,
    check_push,
    default_model_id,
    push_or_exit,
    push_result,
)


__all__ = [
    "PUSH_FAILED",
    "RETRY_WAITS",
    "Base",
    "PushError",
    "as_published",
    "check_evaluation",
    "check_folder",
    "check_model_id",
    "check_push",
    "default_model_id",
    "erasure_card",
    "eval_results",
    "find_base",
    "published_record",
    "push_or_exit",
    "push_result",
    "student_card",
    "write_benchmark",
]
