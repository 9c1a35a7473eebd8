"""One file, one class, one paper. An objective says who draws its latents, what it publishes, and its loss."""

from .base import Objective, TrainingBatch
from .sdd import SDDObjective


__all__ = ["Objective", "SDDObjective", "TrainingBatch"]
