"""SLD's equations, element by element, against a plain reading of the paper."""

import math

import pytest
import torch

from diffusers_safe import SafetyConfig
from diffusers_safe.pipelines.guidance import SAFETY_CONFIGS, SafetyState, guide_safely


def paper_steps(predictions, config):
    """The rule on Python numbers, one element at a time."""
    momentum, changed = 0.0, []
    for step, (uncond, text, safety) in enumerate(predictions):
        scale = min(abs(text - safety) * config.sld_guidance_scale, 1.0)
        mu = 0.0 if text - safety >= config.sld_threshold else scale
        gamma = (safety - uncond) * mu + config.sld_momentum_scale * momentum
        momentum = config.sld_mom_beta * momentum + (1 - config.sld_mom_beta) * gamma
        changed.append(text if step < config.sld_warmup_steps else text - gamma)
    return changed


@pytest.mark.parametrize("config", [*SAFETY_CONFIGS.values(), SafetyConfig(3, 2, -0.1, 1.0, 0.9)])
def test_every_element_follows_the_paper(config):
    predictions = torch.randn(12, 3, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, changed = SafetyState(), []
    for uncond, text, safety in predictions:
        text, state = guide_safely(uncond, text, safety, state, config)
        changed.append(text)
    assert state.step == 12
    changed = torch.stack(changed)
    for index in [(0, 0, 0, 0), (1, 3, 1, 0), (0, 2, 1, 1)]:
        expected = paper_steps(predictions[(..., *index)].tolist(), config)
        assert changed[(slice(None), *index)].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_concept_that_is_the_unconditional_prediction_changes_nothing():
    uncond, text = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    changed, _ = guide_safely(uncond, text, uncond, SafetyState(), SafetyConfig.MAX)
    assert torch.equal(changed, text)


def test_the_configs_are_those_of_the_authors():
    assert {name: tuple(dict(config).values()) for name, config in SAFETY_CONFIGS.items()} == {
        "weak": (200, 15, 0.0, 0.0, 0.0),
        "medium": (1000, 10, 0.01, 0.3, 0.4),
        "strong": (2000, 7, 0.025, 0.5, 0.7),
        "max": (5000, 0, 1.0, 0.5, 0.7),
    }
    assert SafetyConfig() == SafetyConfig.MEDIUM == SafetyConfig.named("medium")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sld_guidance_scale": -0.5}, "sld_guidance_scale -0.5: must be at least 0, and finite"),
        ({"sld_guidance_scale": math.nan}, "sld_guidance_scale nan: must be a finite number"),
        ({"sld_warmup_steps": -1}, "sld_warmup_steps -1: must be at least 0"),
        ({"sld_threshold": math.nan}, "sld_threshold nan: must be a finite number"),
        ({"sld_momentum_scale": 1.5}, r"sld_momentum_scale 1.5: must be in \[0, 1\]"),
        ({"sld_guidance_scale": None}, "sld_guidance_scale None: must be a number"),
        ({"sld_threshold": "low"}, "sld_threshold 'low': must be a number"),
        ({"sld_warmup_steps": 0.5}, "sld_warmup_steps 0.5: must be a whole number"),
        ({"sld_mom_beta": 1}, r"sld_mom_beta 1: must be in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        SafetyConfig(**values)


def test_a_config_is_a_mapping_as_the_dicts_of_diffusers_are():
    config = SafetyConfig.WEAK
    assert dict(config) == dict(config.items()) == {name: getattr(config, name) for name in config}
    assert len(config) == 5 and "sld_threshold" in config and config.get("strength") is None
    assert {config: "weak"}[SafetyConfig(**config)] == "weak"


def test_an_unknown_preset_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match="'extreme': unknown; allowed are weak, medium, strong, max"):
        SafetyConfig.named("extreme")
