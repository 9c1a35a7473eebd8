"""The strength of an edit, `--target` of methods that do not train."""

import pytest
import torch
from torch import nn

from diffusers_safe import erase
from diffusers_safe.erasure.strength import MOST_MEASUREMENTS, find_strength
from diffusers_safe.families import load_pipeline
from scripts import accelerate_on_cpu


class Weights:
    def __init__(self):
        self.student = {"a": nn.Parameter(torch.tensor([3.0, 1.0]))}
        self.frozen = {"a": torch.tensor([1.0, 2.0])}

    @property
    def strength(self):
        change = self.student["a"] - self.frozen["a"]
        torch.testing.assert_close(change[0], -2 * change[1])  # scaled, not turned
        return change[0].item() / 2


class Watched:
    def __init__(self, weights, left):
        self.weights, self.left, self.tried = weights, left, []

    def measure(self, which):
        assert which == "student"
        self.tried.append(self.weights.strength)
        return {"concept_left": self.left(self.weights.strength)}


@pytest.mark.parametrize(
    "left, target, expected, within",
    [
        (lambda s: 1 - s, 0.3, 0.7, 0.02),
        (lambda s: 1 - 0.8 * s, 0.0, 1.25, 0.03),
        (lambda s: 1 - 0.8 * s, 0.2, 1.0, 1e-6),  # as it is
        (lambda s: (1 - s / 2) ** 2, 0.1, 2 * (1 - 0.1**0.5), 0.1),
        (lambda s: 1 - s**3, 0.5, 0.5 ** (1 / 3), 0.1),
        (lambda s: 0.9 if s < 0.8 else -0.5, 0.0, 0.8, 0.1),
        (lambda s: 1 - 0.3 * s, 0.05, 2.0, 1e-6),  # not reached: the strongest
        (lambda s: max(1 - 0.9 * s, 0.07 - 0.01 * s), 0.01, 1.0, 1e-6),  # not reached, and more hardly helps
    ],
)
def test_the_smallest_strength_that_reaches_the_target_is_found(left, target, expected, within):
    weights = Weights()
    watch = Watched(weights, left)
    strength = find_strength(weights, watch, target)
    assert strength == pytest.approx(expected, abs=within)
    assert weights.strength == pytest.approx(strength, rel=1e-5)
    assert len(watch.tried) <= MOST_MEASUREMENTS and watch.tried[0] == 1
    if min(map(left, watch.tried)) <= target:
        assert left(strength) <= target + 1e-6


@pytest.fixture(scope="module")
def plain(tiny_model_folder):
    return edit(tiny_model_folder)


def edit(model, **options):
    with accelerate_on_cpu():
        return erase(str(model), ["knife"], "uce", anchor_prompts=["tree"], watch_prompts=[], **options)


def test_the_edit_of_a_closed_form_is_scaled(plain, tiny_model_folder, caplog):
    target = 0.5 + plain.measured["concept_left"] / 2
    erasure = edit(tiny_model_folder, target=target)
    strength = erasure.record.arguments["strength"]
    assert erasure.measured["concept_left"] <= target and 0 < strength < 1 and not caplog.text
    base = dict(load_pipeline(str(tiny_model_folder)).unet.named_parameters())
    for name, value in erasure.weights.items():
        expected = base[name] + strength * (plain.weights[name] - base[name])
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
    assert "strength" not in plain.record.arguments


def test_a_target_that_no_strength_reaches_is_reported(tiny_model_folder, caplog, monkeypatch):
    monkeypatch.setattr("diffusers_safe.erasure.strength.MOST_STRENGTH", 1.001)
    erasure = edit(tiny_model_folder, target=0.0)
    left = erasure.measured["concept_left"]
    assert left > 0 and f"target 0: not reached, {left:.2g} is left at the best strength" in caplog.text
