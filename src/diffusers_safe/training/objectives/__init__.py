"""One file, one class, one paper. An objective says who draws its latents, what it publishes, and its loss."""

from .base import Objective, TrainingBatch
from .esd import ESDObjective
from .sdd import SDDObjective


__all__ = ["ESDObjective", "Objective", "SDDObjective", "TrainingBatch"]
