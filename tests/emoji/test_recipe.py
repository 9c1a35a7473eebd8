"""The recipe with a few steps: it continues after a kill, and its parts become a stock pipeline."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from diffusers_safe.emoji.architecture import build_autoencoder, build_t5_tokenizer, build_tokenizer
from diffusers_safe.emoji.recipe import __main__ as recipe
from diffusers_safe.emoji.recipe import pictures as recipe_pictures
from diffusers_safe.emoji.recipe.__main__ import RecipeArguments
from diffusers_safe.emoji.recipe.autoencoder import DECODED_NOISE, decoder_stage
from diffusers_safe.emoji.recipe.pictures import CaptionedLatents, Lesson, load_pictures, stratified
from diffusers_safe.emoji.recipe.stage import Round, Stage, learning_rate_factor, train_stage
from diffusers_safe.emoji.recipe.transformer import SHORT_LENGTH, STOCK_LENGTH, TRANSFORMER_LESSONS, transformer_stage
from diffusers_safe.emoji.recipe.unet import UNET_LESSONS, unet_stage
from diffusers_safe.emoji.render import render_many
from diffusers_safe.emoji.scenes import UPRIGHT, VARIED, draw_caption


pytestmark = pytest.mark.usefixtures("on_cpu")
ROOT = Path(__file__).parents[2]


def arguments(folder, **changes):
    tiny = {
        "num_pictures": 12,
        "judge_steps": 1,
        "autoencoder_steps": 1,
        "decoder_steps": 1,
        "unet_steps": [1] * len(UNET_LESSONS),
        "transformer_steps": [1] * len(TRANSFORMER_LESSONS),
    }
    return RecipeArguments(output_dir=str(folder), **{**tiny, **changes})


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("stages", ["denoiser", "unet"], "judge, second_judge, autoencoder, decoder, unet, transformer, assemble"),
        ("num_pictures", 0, "at least 1"),
        ("autoencoder_steps", 0, "at least 1"),
        ("judge_steps", -1, "at least 1"),
        ("unet_steps", [2, 2], "10 numbers, each at least 1"),
        ("unet_steps", [1] * 9 + [0], "10 numbers, each at least 1"),
        ("transformer_steps", [], "4 numbers, each at least 1"),
    ],
)
def test_invalid_values_are_reported(tmp_path, name, value, allowed):
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, **{name: value})
    shown = {"stages": "denoiser"}.get(name, str(value))
    assert name in str(error.value) and shown in str(error.value) and allowed in str(error.value)


# --- a stage that is stopped -----------------------------------------------------------------------------------------


class Kill(BaseException):
    """Like a kill: no `except Exception` catches it."""


class ToyLoss(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 1))

    def forward(self, pictures, target):
        return (self.layers(pictures) - target).square().mean()


def toy_stage(*rounds, kill_at=None, seen=None, ema_decay=0.9, decays=(False, True)):
    calls = iter(range(10**6))

    def make_batch(rng, size):
        if next(calls) == kill_at:
            raise Kill
        pictures = torch.from_numpy(rng.standard_normal((size, 3, 8, 8), dtype=np.float32))
        if seen is not None:
            seen.append(pictures.clone())
        return {"pictures": pictures, "target": pictures.mean((1, 2, 3))[:, None]}

    last = len(rounds) - 1
    made = [Round(steps, 4, make_batch, decays[place == last]) for place, steps in enumerate(rounds)]
    return Stage("toy", ToyLoss(), made, 1e-2, ema_decay)


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_stage_that_is_killed_repeatedly_gives_the_same_result(tmp_path):
    whole = train_stage(toy_stage(9), tmp_path / "whole", checkpoint_minutes=0)
    for done_before in (2, 4):
        with pytest.raises(Kill):  # a checkpoint after every step
            train_stage(toy_stage(9, kill_at=done_before), tmp_path / "stopped", checkpoint_minutes=0)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (tmp_path / "stopped" / "toy" / "round-1" / "checkpoint-6").is_dir()
    seen = []
    assert same(train_stage(toy_stage(9, seen=seen), tmp_path / "stopped"), whole)
    assert len(seen) == 3


def test_without_a_checkpoint_a_stage_starts_again(tmp_path):
    whole = train_stage(toy_stage(3), tmp_path / "whole")
    with pytest.raises(Kill):
        train_stage(toy_stage(3, kill_at=2), tmp_path / "stopped", checkpoint_minutes=9)
    assert same(train_stage(toy_stage(3), tmp_path / "stopped"), whole)


def test_a_finished_stage_is_loaded_and_not_trained_again(tmp_path):
    trained = train_stage(toy_stage(3), tmp_path)
    assert same(train_stage(toy_stage(3, kill_at=0), tmp_path), trained)


@pytest.mark.parametrize("steps, seed, message", [(2, 1, "seed 0, not 1"), (3, 0, "steps 2, not 3")])
def test_a_stage_does_not_continue_with_other_settings(tmp_path, steps, seed, message):
    train_stage(toy_stage(2), tmp_path)
    with pytest.raises(ValueError, match=f"contains a run with other settings .{message}"):
        train_stage(toy_stage(steps), tmp_path, seed)


def test_the_result_is_the_average_and_not_the_last_weights(tmp_path):
    averaged = train_stage(toy_stage(6), tmp_path / "averaged")
    last = train_stage(toy_stage(6, ema_decay=0.0), tmp_path / "last")  # an average of the last alone
    assert same(last, train_stage(toy_stage(6, ema_decay=0.0), tmp_path / "again"))
    assert not torch.allclose(averaged.layers[3].weight, last.layers[3].weight, atol=1e-5)


def test_a_compiled_stage_gives_the_same_result(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(type(module)))
    plain, stage = train_stage(toy_stage(2), tmp_path / "plain"), toy_stage(2)
    stage.compiled = True
    assert same(train_stage(stage, tmp_path / "compiled"), plain) and compiled == [ToyLoss]


def test_batches_depend_on_seed_and_step(tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        seen = []
        train_stage(toy_stage(3, seen=seen), tmp_path / name, seed)
        runs.append(torch.stack(seen))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_the_learning_rate_warms_up_and_decays_to_zero():
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 200) and factors[199:601] == [1.0] * 402
    assert factors[800] == pytest.approx(0.5) and 0 < factors[999] < 0.01
    earlier = [learning_rate_factor(step, 1000, decays=False) for step in range(1000)]
    assert earlier == factors[:600] + [1.0] * 400


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_finished_rounds_are_enough_to_continue_on_another_machine(tmp_path):
    whole = train_stage(toy_stage(3, 4), tmp_path / "whole")
    with pytest.raises(Kill):
        train_stage(toy_stage(3, 4, kill_at=5), tmp_path / "stopped", checkpoint_minutes=9)
    AcceleratorState._reset_state(reset_partial_state=True)
    finished = tmp_path / "elsewhere" / "toy" / "round-1"
    finished.mkdir(parents=True)
    for name in ("ema.pt", "settings.json"):
        shutil.copy(tmp_path / "stopped" / "toy" / "round-1" / name, finished)
    seen = []
    assert same(train_stage(toy_stage(3, 4, seen=seen), tmp_path / "elsewhere"), whole)
    assert len(seen) == 4


def test_only_the_newest_finished_round_is_needed(tmp_path):
    whole = train_stage(toy_stage(2, 3, 2), tmp_path / "whole")
    newest = tmp_path / "elsewhere" / "toy" / "round-2"
    newest.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "toy" / "round-2", newest)
    seen = []
    assert same(train_stage(toy_stage(2, 3, 2, seen=seen), tmp_path / "elsewhere"), whole)
    assert len(seen) == 2


def test_a_round_starts_from_the_average_of_the_previous_one_in_half_precision(tmp_path):
    first = torch.load(train_round_1(tmp_path), weights_only=True)
    assert {value.dtype for value in first.values() if value.is_floating_point()} == {torch.float16}
    module = toy_stage(3, 1)
    module.learning_rate = 0.0  # a round that changes nothing
    shutil.rmtree(tmp_path / "toy" / "round-2")
    (tmp_path / "toy" / "round-1" / "settings.json").unlink()
    assert torch.equal(train_stage(module, tmp_path).layers[0].weight, first["layers.0.weight"].float())


def train_round_1(folder):
    train_stage(toy_stage(3, 1), folder)
    return folder / "toy" / "round-1" / "ema.pt"


def test_only_a_round_whose_learning_rate_decays_depends_on_its_number_of_steps(tmp_path):
    with pytest.raises(Kill):
        train_stage(toy_stage(9, 2, kill_at=4), tmp_path, checkpoint_minutes=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(
        ValueError, match=r"round-1: its newest checkpoint is of step 4, but the round has only 3 steps"
    ):
        train_stage(toy_stage(3, 2), tmp_path)
    seen = []
    train_stage(toy_stage(5, 2, seen=seen), tmp_path)  # ended sooner than it was begun
    assert len(seen) == 1 + 2
    with pytest.raises(ValueError, match="round-2: contains a run with other settings .steps 2, not 3"):
        train_stage(toy_stage(5, 3), tmp_path)


# --- pictures and the whole ------------------------------------------------------------------------------------------


def test_pictures_are_rendered_once_and_depend_on_the_seed(tmp_path, monkeypatch):
    pictures, scenes = load_pictures(tmp_path, 7, 3, VARIED)
    expected, expected_scenes = render_many(3, 0, 7, variation=VARIED)
    assert np.array_equal(pictures, expected) and scenes == expected_scenes
    with monkeypatch.context() as patch:
        patch.delattr(recipe_pictures, "render_many")
        again, same_scenes = load_pictures(tmp_path, 7, 3, VARIED)
    assert np.array_equal(again, expected) and same_scenes == expected_scenes
    more, _ = load_pictures(tmp_path, 8, 3, VARIED)
    assert np.array_equal(more[:7], expected) and len(more) == 8
    upright, _ = load_pictures(tmp_path, 7, 3, UPRIGHT)
    assert np.array_equal(upright, render_many(3, 0, 7, variation=UPRIGHT)[0]) and not np.array_equal(
        upright, expected
    )


def captioned_latents():
    moments = np.concatenate([np.full((5, 8, 16, 16), 3.0), np.full((5, 8, 16, 16), 0.5)], axis=1).astype(np.float16)
    return CaptionedLatents(moments, render_many(0, 0, 5)[1], build_tokenizer(), scaling_factor=2.0, shift_factor=1.0)


def test_latents_are_sampled_and_normalised_and_one_caption_in_ten_is_empty():
    data = captioned_latents()
    sample = data.sample(np.random.default_rng(0), 400)
    assert sample["latents"].shape == sample["noise"].shape == (400, 8, 16, 16)
    assert sample["latents"].mean().item() == pytest.approx(4, abs=0.01)  # 2 (3 - 1)
    assert sample["latents"].std().item() == pytest.approx(1, abs=0.01)  # 2 x 0.5
    assert sample["captions"].count("") / 400 == pytest.approx(0.1, abs=0.04)
    tokens = data.tokenizer(sample["captions"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(sample["input_ids"], tokens)


def test_only_the_decoder_is_trained_again_and_on_noisy_latents(tmp_path):
    pictures, _ = render_many(0, 0, 6)
    autoencoder = build_autoencoder()
    stage = decoder_stage(autoencoder, pictures, 2.0, 2, 1e-2, {})
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    nn.init.constant_(autoencoder.quant_conv.bias[8:], -20.0)  # a narrow posterior: all noise is what the stage adds
    batch = stage.rounds[0].make_batch(np.random.default_rng(0), 64)
    autoencoder.quant_conv.load_state_dict({name: before[f"quant_conv.{name}"] for name in ("weight", "bias")})
    deviations = (batch["latents"] - autoencoder.encode(batch["pictures"]).latent_dist.mean).flatten(1).std(dim=1)
    assert 0 < deviations.min() < 0.2 and 1 < deviations.max() <= 1.05 * DECODED_NOISE * 2.0
    train_stage(stage, tmp_path)
    changed = {name.split(".")[0] for name, value in autoencoder.state_dict().items() if (value != before[name]).any()}
    assert changed == {"decoder", "post_quant_conv"}


def test_stratified_numbers_have_one_in_each_part():
    values = stratified(np.random.default_rng(0), 8)
    assert sorted((values * 8).astype(int)) == list(range(8))


def test_lessons_decide_images_noise_levels_sizes_and_decay_and_t5_tokens_are_mostly_short():
    data, asked = captioned_latents(), []
    lessons = [Lesson(1, VARIED), Lesson(1, UPRIGHT, details=True, decays=True), Lesson(1, VARIED, 64, coarse=True)]

    def latents(variation):
        asked.append(variation)
        return data

    unet, transformer = unet_stage(lessons, latents, 1e-3, {}), transformer_stage(lessons[:2], latents, 1e-3, {})
    assert [(r.batch_size, r.decays) for r in unet.rounds] == [(32, False), (32, True), (64, False)] and not asked
    (flow_round, last_flow_round), (unet_round, last_unet_round, coarse_round) = transformer.rounds, unet.rounds
    batches = [flow_round.make_batch(np.random.default_rng(seed), 16) for seed in range(90)]
    lengths = [batch["t5_input_ids"].shape[1] for batch in batches]
    assert set(lengths) == {SHORT_LENGTH, STOCK_LENGTH} and lengths.count(STOCK_LENGTH) < 10
    sigmas = torch.cat([batch["sigmas"] for batch in batches])
    assert 0 < sigmas.min() and sigmas.max() < 1 and sigmas.median().item() == pytest.approx(0.73, abs=0.03)
    for round_, median in ((unet_round, 750), (last_unet_round, 500)):
        timesteps = round_.make_batch(np.random.default_rng(0), 64)["timesteps"]
        assert timesteps.median() == pytest.approx(median, abs=20) and 0 <= timesteps.min() and timesteps.max() <= 999
    assert asked[-2:] == [VARIED, UPRIGHT]
    whole, small = (round_.make_batch(np.random.default_rng(0), 64) for round_ in (unet_round, coarse_round))
    assert small["latents"].shape == (64, 8, 8, 8) and torch.equal(small["timesteps"], whole["timesteps"])
    assert small["noise"].std().item() == pytest.approx(1, abs=0.02)
    assert small["latents"][3, 2, 1, 0].item() == pytest.approx(whole["latents"][3, 2, 2:4, 0:2].sum().item() / 2)
    sigmas = last_flow_round.make_batch(np.random.default_rng(0), 64)["sigmas"]
    assert sigmas.quantile(0.25) == pytest.approx(0.25, abs=0.03) and sigmas.median() == pytest.approx(0.5, abs=0.03)


def test_every_caption_fits_into_the_short_length_and_each_word_is_one_token():
    tokenizer, rng = build_t5_tokenizer(), np.random.default_rng(0)
    captions = [draw_caption(scene, rng) for scene in render_many(0, 0, 500)[1]]
    assert max(map(len, tokenizer(captions).input_ids)) <= SHORT_LENGTH
    assert tokenizer.tokenize("an axe, red background") == ["▁an", "▁axe", ",", "▁red", "▁background"]
    assert tokenizer.unk_token_id not in tokenizer("a zebra-42").input_ids


@pytest.mark.slow
def test_the_finished_folders_are_stock_pipelines_in_half_precision(tmp_path):
    recipe.main(arguments(tmp_path, stages=["autoencoder", "unet", "transformer", "assemble"]))
    for name, kind, parts in (
        ("model", StableDiffusionPipeline, ("unet", "vae", "text_encoder")),
        ("model_flow", StableDiffusion3Pipeline, ("transformer", "vae", "text_encoder", "text_encoder_3")),
    ):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / name)
        assert type(pipeline) is kind and {getattr(pipeline, part).dtype for part in parts} == {torch.float32}
        pipeline.set_progress_bar_config(disable=True)
        (picture,) = pipeline("a knife", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
        assert picture.size == (64, 64)

        moments = [np.load(path).astype(np.float64) for path in (tmp_path / "cache").glob("latents-*.npy")]
        assert len(moments) == 5  # of the images of the decoder's statistics and of each kind of round
        latents = np.concatenate(moments)
        mean, std = np.split(latents, 2, axis=1)
        sampled = mean + std * np.random.default_rng(0).standard_normal(mean.shape)
        config = pipeline.vae.config
        assert config.scaling_factor * sampled.std() == pytest.approx(1, rel=0.05)
        if name == "model_flow":
            assert config.shift_factor == pytest.approx(sampled.mean(), abs=0.02)
        for path in (tmp_path / name).rglob("*.safetensors"):
            assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    averaged = torch.load(tmp_path / "unet" / f"round-{len(UNET_LESSONS)}" / "ema.pt", weights_only=True)
    unet = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    decoder = torch.load(tmp_path / "decoder" / "round-1" / "ema.pt", weights_only=True)
    for name in ("model", "model_flow"):
        vae = load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors")
        assert torch.equal(vae["decoder.conv_in.weight"], decoder["decoder.conv_in.weight"])
    assert torch.equal(unet["conv_in.weight"], averaged["unet.conv_in.weight"])

    for name in ("model", "model_flow"):
        shutil.rmtree(tmp_path / name)
    recipe.main(arguments(tmp_path, stages=["unet", "assemble"]))  # one of the models
    assert (tmp_path / "model" / "model_index.json").exists() and not (tmp_path / "model_flow").exists()


# --- the command -----------------------------------------------------------------------------------------------------


def command(folder):
    return [
        sys.executable, "-m", "diffusers_safe.emoji.recipe", "--output_dir", str(folder), "--num_pictures", "12",
        "--judge_steps", "1", "--autoencoder_steps", "5", "--decoder_steps", "1",
        "--unet_steps", "3", "4", *["1"] * 8, "--transformer_steps", "4", *["1"] * 3, "--checkpoint_minutes", "0",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_killed_in_three_stages_gives_the_same_result(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment, cwd=tmp_path, capture_output=True)
    stopped = tmp_path / "stopped"
    for stage in ("autoencoder", "unet", "transformer"):
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(
                command(stopped), env=environment, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True
            )
        while not (stopped / stage / "round-1" / "checkpoint-1").exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (stopped / stage / "round-1" / "ema.pt").exists(), (tmp_path / "output").read_text()[-2000:]
    subprocess.run(command(stopped), check=True, env=environment, cwd=tmp_path, capture_output=True)

    ends = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("*/round-*/ema.pt"))
    rounds = {"autoencoder": 1, "decoder": 1, "judge": 1, "second_judge": 1, "transformer": 4, "unet": 10}
    assert Counter(end.parts[0] for end in ends) == rounds
    for end in ends:
        first, second = (torch.load(tmp_path / run / end, weights_only=True) for run in ("whole", "stopped"))
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], end
    written = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("model*/**/*.safetensors")]
    written += [Path("judges", name, "model.safetensors") for name in ("judge", "second_judge")]
    assert len(written) == 10
    for path in written:
        assert (tmp_path / "whole" / path).read_bytes() == (stopped / path).read_bytes()
    assert json.loads((stopped / "model" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
