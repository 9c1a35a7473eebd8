"""The recipe with a few steps: what a kill leaves, and that the parts become a stock pipeline."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from diffusers_safe.emoji import recipe
from diffusers_safe.emoji.recipe import RecipeArguments, Stage, learning_rate_factor, load_pictures, train_stage
from diffusers_safe.emoji.render import render_many


pytestmark = pytest.mark.usefixtures("on_cpu")
ROOT = Path(__file__).parents[2]


def arguments(folder, **changes):
    tiny = {"num_pictures": 12, "autoencoder_steps": 1, "classifier_steps": 1, "denoiser_steps": 1}
    return RecipeArguments(output_dir=str(folder), **{**tiny, **changes})


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("stages", ["denoiser", "unet"], "autoencoder, classifier, denoiser, assemble"),
        ("num_pictures", 0, "at least 1"),
        ("autoencoder_steps", 0, "at least 1"),
        ("classifier_steps", -1, "at least 1"),
        ("denoiser_steps", 0, "at least 1"),
        ("emphasized_objects", ["sword", "spoon"], "allowed are knife"),
    ],
)
def test_bad_values_name_argument_value_and_what_is_allowed(tmp_path, name, value, allowed):
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, **{name: value})
    told = {"stages": "unet", "emphasized_objects": "spoon"}.get(name, str(value))
    assert name in str(error.value) and told in str(error.value) and allowed in str(error.value)


# --- a stage that is stopped -----------------------------------------------------------------------------------------


class Kill(BaseException):
    """As final as a kill: nothing catches it."""


class ToyLoss(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 1))

    def forward(self, pictures, target):
        return (self.layers(pictures) - target).square().mean()


def toy_stage(steps, kill_at=None, seen=None, ema_decay=0.9):
    calls = iter(range(10**6))

    def make_batch(rng, size):
        if next(calls) == kill_at:
            raise Kill
        pictures = torch.from_numpy(rng.standard_normal((size, 3, 8, 8), dtype=np.float32))
        if seen is not None:
            seen.append(pictures.clone())
        return {"pictures": pictures, "target": pictures.mean((1, 2, 3))[:, None]}

    return Stage("autoencoder", ToyLoss(), steps, 1e-2, 4, ema_decay, make_batch)


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_stage_killed_again_and_again_ends_where_an_undisturbed_one_does(tmp_path):
    whole = train_stage(toy_stage(9), arguments(tmp_path / "whole", checkpoint_minutes=0))
    stopped = arguments(tmp_path / "stopped", checkpoint_minutes=0)  # a checkpoint after every step
    for done_before in (2, 4):
        with pytest.raises(Kill):
            train_stage(toy_stage(9, kill_at=done_before), stopped)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (tmp_path / "stopped" / "autoencoder" / "checkpoint-6").is_dir()
    seen = []
    assert same(train_stage(toy_stage(9, seen=seen), stopped), whole)
    assert len(seen) == 3


def test_without_a_checkpoint_yet_it_starts_again(tmp_path):
    whole = train_stage(toy_stage(3), arguments(tmp_path / "whole"))
    with pytest.raises(Kill):
        train_stage(toy_stage(3, kill_at=2), arguments(tmp_path / "stopped", checkpoint_minutes=9))
    assert same(train_stage(toy_stage(3), arguments(tmp_path / "stopped")), whole)


def test_a_finished_stage_is_read_and_not_trained_again(tmp_path):
    trained = train_stage(toy_stage(3), arguments(tmp_path))
    assert same(train_stage(toy_stage(3, kill_at=0), arguments(tmp_path)), trained)


def test_a_stage_does_not_go_on_with_other_arguments(tmp_path):
    train_stage(toy_stage(2), arguments(tmp_path))
    with pytest.raises(ValueError, match="holds a run with other arguments .seed 0 there, 1 here"):
        train_stage(toy_stage(2), arguments(tmp_path, seed=1))


def test_more_steps_continue_a_finished_stage_and_fewer_are_refused(tmp_path):
    kept = arguments(tmp_path, checkpoint_minutes=0)  # a checkpoint after every step but the last
    train_stage(toy_stage(4), kept)
    seen = []
    train_stage(toy_stage(6, seen=seen), kept)
    assert len(seen) == 3  # from checkpoint-3
    with pytest.raises(ValueError, match=r"--autoencoder_steps 2: .* is already at step 5"):
        train_stage(toy_stage(2), kept)


def test_the_result_is_the_average_and_not_the_last_weights(tmp_path):
    averaged = train_stage(toy_stage(6), arguments(tmp_path / "averaged"))
    last = train_stage(toy_stage(6, ema_decay=0.0), arguments(tmp_path / "last"))  # an average of the last alone
    assert same(last, train_stage(toy_stage(6, ema_decay=0.0), arguments(tmp_path / "again")))
    assert not torch.allclose(averaged.layers[3].weight, last.layers[3].weight, atol=1e-5)


def test_batches_depend_on_seed_and_step(tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        seen = []
        train_stage(toy_stage(3, seen=seen), arguments(tmp_path / name, seed=seed))
        runs.append(torch.stack(seen))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_the_learning_rate_warms_up_stays_and_goes_to_zero():
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 200) and factors[199:601] == [1.0] * 402
    assert factors[800] == pytest.approx(0.5) and 0 < factors[999] < 0.01


# --- pictures and the whole ------------------------------------------------------------------------------------------


def test_emphasized_objects_are_seen_more_often(tmp_path, monkeypatch):
    counts = Counter()

    def count_batches(stage, args):
        for step in range(100):
            stage.make_batch(np.random.default_rng(step), 32)
        return stage.module

    monkeypatch.setattr(recipe, "train_stage", count_batches)
    monkeypatch.setattr(recipe, "draw_caption", lambda scene, rng: counts.update([scene.name]) or scene.name)
    scenes = render_many(0, 0, 2, hold_out=False)[1]
    scenes = [replace(scenes[0], name="sword"), replace(scenes[1], name="cat")]
    moments = np.ones((2, 8, 16, 16), dtype=np.float16)
    for emphasized, share in ([], 1), (["sword"], 4):
        counts.clear()
        recipe.train_denoiser(arguments(tmp_path, emphasized_objects=emphasized), moments, scenes)
        assert counts["sword"] / counts["cat"] == pytest.approx(share, rel=0.15)


def test_pictures_are_rendered_once_and_are_those_of_the_seed(tmp_path, monkeypatch):
    pictures, scenes = load_pictures(arguments(tmp_path, num_pictures=7, seed=3))
    expected, expected_scenes = render_many(3, 0, 7)
    assert np.array_equal(pictures, expected) and scenes == expected_scenes
    with monkeypatch.context() as patch:
        patch.delattr(recipe, "render_many")
        again, same_scenes = load_pictures(arguments(tmp_path, num_pictures=7, seed=3))
    assert np.array_equal(again, expected) and same_scenes == expected_scenes
    more, _ = load_pictures(arguments(tmp_path, num_pictures=8, seed=3))
    assert np.array_equal(more[:7], expected) and len(more) == 8


def test_the_finished_folder_is_a_stock_pipeline_in_half_precision(tmp_path):
    recipe.main(arguments(tmp_path, stages=["autoencoder", "denoiser", "assemble"]))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    (picture,) = pipeline("a knife", num_inference_steps=1, generator=generator).images
    assert picture.size == (64, 64)

    latents = np.load(next((tmp_path / "cache").glob("latents-*.npy"))).astype(np.float64)
    mean, std = np.split(latents, 2, axis=1)
    drawn = mean + std * np.random.default_rng(0).standard_normal(mean.shape)
    assert pipeline.vae.config.scaling_factor * drawn.std() == pytest.approx(1, rel=0.05)

    weights = list((tmp_path / "model").rglob("*.safetensors"))
    assert len(weights) == 3
    assert {value.dtype for path in weights for value in load_file(path).values()} == {torch.float16}
    averaged = torch.load(tmp_path / "denoiser" / "ema-1.pt", weights_only=True)
    assert torch.equal(pipeline.unet.conv_in.weight, averaged["unet.conv_in.weight"].half().float())


# --- the command -----------------------------------------------------------------------------------------------------


def command(folder):
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu",
        "-m", "diffusers_safe.emoji.recipe", "--output_dir", str(folder), "--num_pictures", "12",
        "--autoencoder_steps", "5", "--classifier_steps", "1", "--denoiser_steps", "4", "--checkpoint_minutes", "0",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_killed_in_two_stages_ends_where_an_undisturbed_one_does(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment, cwd=tmp_path, capture_output=True)
    stopped = tmp_path / "stopped"
    for stage in ("autoencoder", "denoiser"):
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(
                command(stopped), env=environment, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True
            )
        while not (stopped / stage / "checkpoint-1").exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not list((stopped / stage).glob("ema-*.pt")), (tmp_path / "output").read_text()[-2000:]
    subprocess.run(command(stopped), check=True, env=environment, cwd=tmp_path, capture_output=True)

    for average in ("autoencoder/ema-5.pt", "classifier/ema-1.pt", "denoiser/ema-4.pt"):
        first, second = (torch.load(tmp_path / run / average, weights_only=True) for run in ("whole", "stopped"))
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], average
    for path in [
        *(tmp_path / "whole" / "model").rglob("*.safetensors"),
        tmp_path / "whole/classifier/model.safetensors",
    ]:
        assert path.read_bytes() == (stopped / path.relative_to(tmp_path / "whole")).read_bytes()
    assert json.loads((stopped / "model" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
