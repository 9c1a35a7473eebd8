"""The strength of a closed form's edit, found by measuring the edited model."""

import torch

from ..weights.trained import TrainedWeights
from .watch import Watch


MOST_STRENGTH = 2.0
PRECISION = 0.02  # of the strength
MOST_MEASUREMENTS = 8
NEARLY = 0.05  # of `concept_left`


def find_strength(weights: TrainedWeights, watch: Watch, target: float) -> float:
    """Scales an edit, in place, to the smallest strength that leaves no more than a target of the concepts.

    The weights become frozen + strength (edited - frozen). What is left decreases nearly linearly with the strength,
    so a search between two strengths needs a few measurements.

    Args:
        weights (`TrainedWeights`): Its student is the edited model.
        watch (`Watch`): Measures `concept_left`.
        target (`float`): In [0, 1).

    Returns:
        `float`: The strength, at most `MOST_STRENGTH`; if none reaches the target, the smallest that leaves at most
            `NEARLY` more than the best.
    """
    strength, measured = 1.0, {0.0: 1.0}
    low, high = 0.0, MOST_STRENGTH
    while True:
        measured[strength] = watch.measure("student")["concept_left"]
        if measured[strength] <= target:
            high = strength
        else:
            low = strength
        if high - low <= PRECISION or len(measured) > MOST_MEASUREMENTS or low == MOST_STRENGTH:
            break
        following = _between(low, high, measured, target)
        _scale(weights, following / strength)
        strength = following
    least = min(measured.values())
    enough = target if least <= target else least + NEARLY
    best = min(tried for tried, left in measured.items() if left <= enough)
    _scale(weights, best / strength)
    return best


def _between(low: float, high: float, measured: dict[float, float], target: float) -> float:
    """Where the line through two measurements meets the target, not too close to either end."""
    if high not in measured:  # nothing has reached the target yet
        return high
    share = (measured[low] - target) / max(measured[low] - measured[high], 1e-6)
    return low + min(max(share, 0.1), 0.9) * (high - low)


@torch.no_grad()
def _scale(weights: TrainedWeights, factor: float) -> None:
    if factor != 1:
        for name, value in weights.student.items():
            value.sub_(weights.frozen[name]).mul_(factor).add_(weights.frozen[name])
