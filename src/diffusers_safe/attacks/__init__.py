"""Attacks on erased models, and how often they succeed: the attack success rate, beside an unerased control."""

from .base import Attack, Paraphrases, SeedSearch, Target, read_paraphrases
from .inversion import ConceptInversion, InversionSettings
from .outcomes import Outcome, Try
from .run import attack_models


__all__ = [
    "Attack",
    "ConceptInversion",
    "InversionSettings",
    "Outcome",
    "Paraphrases",
    "SeedSearch",
    "Target",
    "Try",
    "attack_models",
    "read_paraphrases",
]
