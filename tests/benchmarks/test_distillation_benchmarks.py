"""The benchmarks of distillation: tiny runs."""

import importlib
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(on_cpu, monkeypatch):
    """Imports a benchmark by name, with the import path of `python benchmarks/NAME.py`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_the_speed_of_a_step(load, tiny_model_folder, monkeypatch, capsys):
    words = f"--model {tiny_model_folder} --rounds 1 --steps 1 --num_images 8 --train_batch_size 2"
    monkeypatch.setattr(sys, "argv", ["benchmark", *words.split()])
    load("distillation_speed").main()
    printed = capsys.readouterr().out
    for name in ("| plain loop |", "| ours |", "| ours, --cache_latents |"):
        assert name in printed


@pytest.mark.parametrize(
    ("words", "message"), [("--only teacher", "only 'teacher': unknown"), ("--rounds 0", "rounds 0: must be")]
)
def test_invalid_arguments_of_the_table_of_students_are_refused(load, monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--output_dir", str(tmp_path / "out"), *words.split()])
    with pytest.raises(SystemExit) as error:
        load("students").main()
    assert error.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_kind_of_recipe_has_a_plan(load, monkeypatch, tmp_path):
    plans = load("recipe_plans")
    monkeypatch.chdir(FOLDER.parent)
    models = plans.write_models(tmp_path)
    steps_of = {"emoji-student": "1,000", "emoji-weapon-sdd": "140", "emoji-cat-esd-x": "80"}
    for name, steps in {**steps_of, "sd-1.4-nudity-sdd": "1,500", "sdxl-artist-lora": "200"}.items():
        row = plans.plan_row(plans.EXAMPLES / f"{name}.yaml", models)
        assert row.startswith(f"| [{name}]({name}.yaml) |") and f"| {steps} |" in row
