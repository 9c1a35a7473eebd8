"""What `make` would run, without running it."""

import subprocess

import pytest

from scripts import ROOT


@pytest.mark.parametrize(("target", "with_nudenet"), [("demo", False), ("quality", False), ("test", True)])
def test_nudenet_is_installed_for_the_tests_only_and_its_licence_is_named(tmp_path, target, with_nudenet):
    words = ["make", "--dry-run", target, f"VENV={tmp_path}/venv"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ".[dev]" in done.stdout
    assert ('--editable ".[eval]"' in done.stdout) == ("AGPL-3.0" in done.stdout) == with_nudenet
    without = subprocess.run([*words, "NUDENET=no"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "[eval]" not in without.stdout
