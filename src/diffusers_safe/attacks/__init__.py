"""Attacks on erased models and their success rate, next to that of the unerased control."""

from .base import Attack, Paraphrases, SeedSearch, Target, read_paraphrases
from .inversion import ConceptInversion
from .outcomes import Attempt, Outcome
from .run import attack
from .token_learning import InversionSettings


__all__ = [
    "Attack",
    "Attempt",
    "ConceptInversion",
    "InversionSettings",
    "Outcome",
    "Paraphrases",
    "SeedSearch",
    "Target",
    "attack",
    "read_paraphrases",
]
