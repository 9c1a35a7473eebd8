"""The benchmarks of erasure training: arguments, tiny runs, and equality of the plain loop and our loop."""

import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from diffusers_safe.comparison.models import LoadedModel
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.loop import ErasureLoop
from diffusers_safe.families import make_family
from diffusers_safe.report.statistics import Estimate


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(on_cpu, monkeypatch):
    """Imports a benchmark by name, with the import path of `python benchmarks/NAME.py`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    return importlib.import_module


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_plain_loop_equals_our_loop(load, make_tiny_pipeline):
    plain = load("plain_loop").PlainLoop(make_tiny_pipeline(), "knife", 4, "cpu")
    options = make_options(
        "sdd",
        pretrained_model_name_or_path="tiny",
        concepts=["knife"],
        output_dir=None,
        num_inference_steps=4,
        watch_prompts=[],
    )
    objective = options.method.objective(["knife"])
    ours = ErasureLoop(Accelerator(cpu=True), make_family(make_tiny_pipeline()), objective, options)
    for number in range(3):
        assert plain.train_step(number) == pytest.approx(ours.train_step(number)["erase"], rel=1e-3)
    for name, average in plain.average.named_parameters():
        if name in ours.weights.ema:
            torch.testing.assert_close(average, ours.weights.ema[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_forward_passes_of_a_step(load, tiny_model_folder, capsys):
    main = load("erasure_arithmetic").main
    main(
        f"--model {tiny_model_folder} --rounds 2 --num_inference_steps 4 --latents_per_trajectory 4 "
        "--trajectory_pool 2".split()
    )
    plain, exact, several, esd, pooled = rows(capsys.readouterr().out)
    assert plain[1] == exact[1] and exact[2] == "1.00"
    assert several[1] == "3.5" and pooled[1] == "3.0"  # 2 * 3 / 4 + 2; no drawing at all
    assert esd[3] == "0" and pooled[3] == "12"  # two trajectories of three steps, twice


@pytest.mark.slow
def test_the_memory_of_a_step(load, capsys):
    load("erasure_memory").main("--size tiny --latent_size 8 --num_inference_steps 1".split())
    plain, ours = rows(capsys.readouterr().out)
    assert plain[3] == "100.0%" and re.fullmatch(r"[0-9.]+ GiB", ours[2])


def test_the_speed_of_a_step(load, capsys, monkeypatch):
    monkeypatch.setattr(load("erasure_gpu"), "in_own_process", lambda function, *args: function(*args))
    size = "--device cpu --size tiny --latent_size 8 --num_inference_steps 2"
    load("erasure_gpu").main(f"{size} --steps 1 --batch_sizes 2 --compile off --mixed_precision no".split())
    ((batch, compiled, *_, share, memory),) = rows(capsys.readouterr().out)
    assert (batch, compiled) == ("2", "off") and share.endswith("%") and memory.endswith("GiB")


# With a GPU the same call runs the benchmark, which takes minutes.
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_an_error_is_reported(load):
    with pytest.raises(SystemExit, match="^error: no GPU is available; --device cpu --size tiny tests the script$"):
        load("erasure_gpu").main([])


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("erasure_arithmetic", "--rounds 1", "rounds 1: must be at least 2"),
        ("erasure_arithmetic", "--trajectory_pool 0", "trajectory_pool 0: must be at least 1"),
        ("erasure_memory", "--size big", "size 'big': unknown; allowed are sd-1, tiny"),
        ("erasure_memory", "--latent_size 7", "latent_size 7: must be a multiple of 8"),
        ("erasure_gpu", "--mixed_precision fp8", "mixed_precision 'fp8': unknown; allowed are no, fp16, bf16"),
        ("erasure_gpu", "--compile maybe", "compile 'maybe': unknown"),
        ("erasure_gpu", "--batch_sizes 0", "batch_sizes [0]: must be at least 1"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(load, capsys, name, words, message):
    with pytest.raises(SystemExit) as stop:
        load(name).main(words.split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


def results_of(gone, lost):
    """Results of [`evaluate_erasure`] for two images each of a cat and a dog; `lost` images of the dog fail."""
    sides = {"before": (24, 2), "after": (gone, 2 - lost)}
    estimates = {
        side: {"concept": Estimate.rate(seen, 24), "others": Estimate.rate(2 + dogs, 4)}
        for side, (seen, dogs) in sides.items()
    }
    change = {"estimate": Estimate.mean([0.0, 0.0, 0.0, float(-lost)], unit="points"), "p_value": 1.0, "test": "none"}
    found = {
        "estimates": estimates,
        "differences": {"after": {"others": change}},
    }
    results = {"metrics": {"emoji_recognition": found}}
    return json.loads(json.dumps(results, default=asdict))


def test_models_are_rows_of_one_table(load, monkeypatch, tmp_path):
    module, asked = load("erasure_table"), []

    def evaluate(models, folder, *what, **options):
        asked.append((what, options["images_per_object"], options["seed"]))
        return results_of(3, 1)

    monkeypatch.setattr(module, "evaluate_erasure", evaluate)
    models = [LoadedModel("before", None), LoadedModel("after", None)]
    table = module.erasure_table(models, tmp_path, 4, 7)
    before, after = rows(table)
    assert before[:3] == ["before", "100.0 % [86.2, 100.0], N=24", "100.0 % [51.0, 100.0], N=4"]
    assert after[1].startswith("12.5 %") and after[3].startswith("-25.0 points")
    assert len(before) == len(after) == 4 and set(before[3:]) == {""}
    assert (tmp_path / "table.md").read_text() == table
    assert module.erasure_table(models, tmp_path, 4, 7, concept="sketch").startswith("| | sketch recognised |")
    assert asked == [
        ((["knife", "gun", "bomb", "sword", "axe"], "weapon", None), 4, 7),
        (([], None, "sketch"), 4, 7),
    ]
