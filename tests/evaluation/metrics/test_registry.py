"""Metrics by name: what is missing is told at once, and nothing heavy is imported before it is needed."""

import subprocess
import sys

import pytest

from diffusers_safe.evaluation.metrics import METRICS, make_metrics


def test_names_are_those_of_the_metrics():
    (metric,) = make_metrics(["pixel_distance"])
    assert metric.name == "pixel_distance" and "pixel_distance" in METRICS


@pytest.mark.parametrize(
    ("names", "message"), [([], "none given"), (["pixels"], "pixel_distance"), (["pixel_distance"] * 2, "given twice")]
)
def test_unknown_names(names, message):
    with pytest.raises(ValueError, match=message):
        make_metrics(names)


def test_the_table_imports_nothing_heavy():
    code = "import sys, diffusers_safe.evaluation.metrics; print({'torch', 'transformers', 'scipy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
