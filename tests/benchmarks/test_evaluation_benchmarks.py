"""The benchmarks of generation: tiny runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffusers_safe.emoji.scenes import OBJECTS


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def main(on_cpu, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(words, name="generation_speed"):
        monkeypatch.setattr(sys, "argv", ["benchmark", *words.split()])
        importlib.import_module(name).main()

    return run


def test_the_speed_of_generation(main, tiny_model_folder, capsys):
    main(f"--model {tiny_model_folder} --rounds 1 --images 3 --batch_sizes 2 --num_inference_steps 1")
    lines = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [name.strip() for name, *_ in lines[2:]] == ["one prompt per call", "`generate`, batches of 2"]
    assert lines[2][2].strip() == "1.00 [1.00, 1.00]" and float(lines[3][1].split()[0]) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [("--batch_sizes 2 0", "batch_sizes [2, 0]: must be"), ("--rounds 0", "rounds 0: must be at least 1")],
)
def test_invalid_arguments_are_refused(main, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_pictures_of_every_object_and_a_blind_test(main, tiny_model_folder, tmp_path, capsys):
    words = f"--model {tiny_model_folder} --output_dir {tmp_path / 'out'} --seeds 2 --num_inference_steps 1"
    main(words, "emoji_pictures")
    page = Image.open(capsys.readouterr().out.strip())
    assert page.width > 600 and page.height > 2000
    answers = json.loads((tmp_path / "out" / "blind" / "answers.json").read_text())
    assert sorted(answers.values()) == sorted(OBJECTS) and list(answers.values()) != OBJECTS
    assert len(list((tmp_path / "out" / "blind").glob("*.png"))) == len(OBJECTS)
