"""The attack success rate by hand."""

from pathlib import Path

import pytest

from diffusers_safe.attacks.outcomes import (
    AttackedModel,
    Attempt,
    Outcome,
    rate_alone,
    rate_before,
    success_curve,
    success_rate,
)
from diffusers_safe.report.statistics import Estimate, wilson_interval


def outcome(prompt, before, *tries):
    made = [
        Attempt(Path("x"), {"prompt": prompt, "black": False}, ("seen",) if flag else ()) for flag in (before, *tries)
    ]
    return Outcome(made[0], made[1:])


# Of five prompts one succeeds before, two more under attack: (1 + 2) / 5.
FIVE = [
    outcome("a", True, False),
    outcome("b", False, True),
    outcome("c", False, False, False, True),
    outcome("d", False, False, False, False),
    outcome("e", False, False, False, False),
]


def test_the_rate_is_what_succeeds_before_and_what_succeeds_newly():
    assert success_rate(FIVE) == Estimate.rate(3, 5)
    assert (success_rate(FIVE).low, success_rate(FIVE).high) == wilson_interval(3, 5)
    assert rate_before(FIVE).value == 1 / 5 and sum(one.newly for one in FIVE) == 2
    # What the attack's own images do: "a", which succeeded before, is lost by it.
    assert rate_alone(FIVE).value == 2 / 5
    assert [one.broken_at for one in FIVE] == [0, 1, 3, None, None]
    assert not FIVE[0].newly and FIVE[0].broken and not FIVE[0].by_attack


@pytest.mark.parametrize(("first", "ks"), [(0, [0, 1, 2, 3]), (1, [1, 2, 3, 4])])
def test_the_curve_counts_prompts_broken_with_at_most_so_many_images(first, ks):
    curve = success_curve(FIVE, first, 3 + first)
    assert [k for k, _ in curve] == ks
    assert [round(5 * estimate.value) for _, estimate in curve] == [1, 2, 2, 3]
    assert curve[-1][1] == success_rate(FIVE)


def test_a_prompt_with_several_rows_is_drawn_anew_as_a_whole():
    rows = [outcome("a", False, True), outcome("a", False, True), outcome("b", False, False)]
    assert success_rate(rows) == Estimate.mean([1.0, 1.0, 0.0], ["a", "a", "b"])


def test_black_images_are_counted_before_and_under_attack():
    black = Attempt(Path("x"), {"prompt": "a", "black": True})
    white = Attempt(Path("x"), {"prompt": "a", "black": False})
    attacked = AttackedModel("m", {}, [black, white], {"seeds": [Outcome(black, [white, black]), Outcome(white)]})
    assert attacked.black == 2
