"""One file, one class, one paper. An objective says who draws its latents, what it publishes, and its loss."""

from .esd import ESDObjective
from .objective import Objective, TrainingBatch
from .sdd import SDDObjective


__all__ = ["ESDObjective", "Objective", "SDDObjective", "TrainingBatch"]
