"""Reports to draw: one of two models as the demo's, and one of many with every kind of section."""

from dataclasses import replace

import numpy as np

from diffusers_safe.report.elements import (
    Change,
    Comparison,
    Curves,
    Grid,
    Headline,
    Plots,
    Report,
    Scatter,
    Shot,
    Strip,
    Table,
)
from diffusers_safe.report.statistics import Estimate


def noise(side=64):
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def make_report(**changes):
    rates, image = [Estimate.rate(95, 100), Estimate.rate(2, 100)], noise()
    return replace(
        Report(
            title="Erased: <weapon> & co",
            summary="Before and after.",
            models=("before", "after"),
            headline=[Headline("weapon recognised", rates, "gone", "Any of them.")],
            sections=[
                Comparison("Prompts", [("a knife", rates)], "gone"),
                Grid("Pairs", [Strip('a "knife"', [Shot(image, "knife"), Shot(image, "taco", missed=True)])], "gone"),
            ],
            protocol={"steps": 25, "model": "3fa5c2d19b7e4410"},
        ),
        **changes,
    )


def make_large_report(models=5):
    """Of many models, with every kind of section."""
    names = [f"model <{i}> of this page" for i in range(models)]
    rates = [Estimate.rate(90 - 15 * i, 100) for i in range(models)]
    distances = [None, *(Estimate(0.1 * i, 0.09 * i, 0.11 * i, 100, "") for i in range(1, models))]
    changes = [None, *(Change(Estimate(-0.15 * i, -0.2 * i, -0.1 * i, 100, "points"), 1e-9) for i in range(1, models))]
    points = [None, *zip(rates[1:], distances[1:])]
    lines = [[(t, Estimate.rate(round(rate.value * 100 * (1 - t)), 100)) for t in (0.2, 0.5, 0.8)] for rate in rates]
    shots = [Shot(noise(300), "seen" if i == 0 else "", blurred=i == 0) for i in range(models)]
    return Report(
        title="Many",
        summary="Many models.",
        models=names,
        headline=[
            Headline("seen", rates, "gone", better="lower", changes=changes),
            Headline("distance", distances, "kept", better="lower"),
        ],
        sections=[
            Plots("Cost", [Scatter("seen", "distance", points, ("lower", "lower"))]),
            Plots("Thresholds", [Curves("threshold", "seen", lines, 0.5)]),
            Comparison("Categories", [("one", rates), ("two", [*rates[:-1], None])], "gone"),
            Table("Papers", ("", "value", "same?"), [("seen", [("A", "1 %", "no https://arxiv.org/abs/1")])]),
            Grid("Seeds", [Strip(f"a long prompt, {i}, {'word ' * 30}", shots) for i in range(2)], "gone"),
        ],
        protocol={"hash": "0" * 64},
        warnings=("3 images are black",),
    )  # fmt: skip
