"""Erasure methods, a file each, and their registry."""

from .method import METHODS, GradientMethod, Method, Preset, Run, find_method, register_method
from .objective import Objective, TrainingBatch


__all__ = [
    "METHODS",
    "GradientMethod",
    "Method",
    "Objective",
    "Preset",
    "Run",
    "TrainingBatch",
    "find_method",
    "register_method",
]
