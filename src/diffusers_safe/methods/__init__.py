"""Erasure methods, a file each, and their registry."""

from .method import (
    DEFAULT_METHOD,
    METHODS,
    GradientMethod,
    Method,
    Preset,
    Run,
    find_method,
    method_label,
    register_method,
)
from .objective import Objective, TrainingBatch


__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "GradientMethod",
    "Method",
    "Objective",
    "Preset",
    "Run",
    "TrainingBatch",
    "find_method",
    "method_label",
    "register_method",
]
