"""The leaderboard of erasure methods: a tiny run with a tiny model instead of the trained ones."""

import importlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from diffusers_safe.emoji.evaluation import erasure_rows
from diffusers_safe.generation.generate import GenerationSettings


FOLDER = Path(__file__).parents[2] / "benchmarks"
METHODS = ["original", "negative prompt", "SEGA", "SLD medium", "SLD max", "text edit", "SDD"]


@pytest.fixture
def leaderboard(on_cpu, monkeypatch, tiny_model_folder):
    """The benchmark without trainings, with a few prompts and two sampling steps."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("erasure_leaderboard")
    trained, all_rows = [], module.erasure_rows

    def train(recipe, folder, seed, threads):
        trained.append(recipe.stem)
        shutil.copytree(tiny_model_folder, folder, dirs_exist_ok=True)

    def few_rows(**options):
        shown = module.TASKS["object"].shown
        return [row for row in all_rows(**options) if row.prompt in shown and row.labels["image"] < 2]

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "erasure_rows", few_rows)
    monkeypatch.setattr(module, "MODEL_FOLDER", tiny_model_folder)
    monkeypatch.setattr(module, "SETTINGS", GenerationSettings(num_inference_steps=2))
    monkeypatch.setattr(module, "write_references", partial(module.write_references, count=8))
    # Another process would not know of these replacements.
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    module.trained = trained

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words)])
        module.main()

    module.run = main
    return module


@pytest.mark.slow
def test_the_leaderboard_has_a_row_for_each_method(leaderboard, tiny_model_folder, tmp_path, capsys):
    words = ["--output_dir", tmp_path / "out", "--quick", "--docs", tmp_path / "docs"]
    leaderboard.run(*words)
    assert leaderboard.trained == ["emoji-cat-sdd"]
    text = (tmp_path / "docs" / "results.md").read_text()
    assert text in capsys.readouterr().out and "![" in text and "seed 0" in text
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][1:] == METHODS
    for column in ("cat recognised ↓, N=2", "other objects recognised ↑", "FID", "KID", "distance", "asks for ↑"):
        assert column in text
    for file in ("leaderboard-object.jpg", "leaderboard-object.svg"):
        assert f"](images/{file})" in text and (tmp_path / "docs" / "images" / file).stat().st_size > 1000
    results = json.loads((tmp_path / "out" / "object" / "results.json").read_text())
    assert list(results["models"]) == METHODS
    assert results["models"]["SLD max"]["settings"]["call"]["safety_concept"] == "a cat"
    assert results["models"]["negative prompt"]["settings"]["negative_prompt"] == "a cat"

    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    leaderboard.run(*words, "--methods", f"mine={tiny_model_folder}")
    assert "| mine |" in capsys.readouterr().out
    kept = [path for path in drawn if "images" in path.parts]
    assert kept and all(path.stat().st_mtime_ns == drawn[path] for path in kept)


def test_erased_concepts_are_measured_and_shown_prompts_are_generated(leaderboard):
    tasks = leaderboard.TASKS
    assert tasks["object"].erased == {"erased": ["cat"], "group": None, "style": None}
    assert tasks["group"].erased["group"] == "weapon" and len(tasks["group"].erased["erased"]) == 5
    assert tasks["style"].erased == {"erased": [], "group": None, "style": "sketch"}
    assert [tasks[name].name for name in tasks] == ["cat", "weapon", "sketch"]
    for task in tasks.values():
        rows = erasure_rows(**task.erased, images_per_object=1, seed=0)
        assert {*task.shown} <= {row.prompt for row in rows}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "objects"], "tasks 'objects': unknown; allowed are object, group, style"),
        (["--seed", "-1"], "seed -1: must be at least 0"),
        (["--methods", "mine=x"], "methods mine=x: name the task that they are for with --tasks"),
        (["--tasks", "object", "--methods", "mine=nowhere"], "model 'nowhere': no folder or Hub repository"),
    ],
)
def test_invalid_arguments_are_refused(leaderboard, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        leaderboard.run("--output_dir", tmp_path / "out", *words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and not (tmp_path / "out").exists()
