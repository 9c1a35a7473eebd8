"""`diffusers_safe.erase`, the way from Python."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from closeness import ROUNDING, difference, trained
from diffusers_safe import erase
from diffusers_safe.methods import METHODS
from diffusers_safe.provenance import fingerprint
from diffusers_safe.weights.trained import select_parameters


pytestmark = pytest.mark.usefixtures("on_cpu")
REQUIRED = {"concept_ablation": {"anchor_prompt": "a tool"}}  # options without a default
QUICK = {
    "max_train_steps": 2,
    "num_inference_steps": 3,
    "learning_rate": 1e-3,
    "watch_prompts": ["a cat"],
}
SDD = {**QUICK, "method": "sdd"}
ONE_STEP = {
    "method": "sdd",
    "num_inference_steps": 2,
    "max_train_steps": 1,
    "progress_bar": False,
    "watch_prompts": [],
}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trains])
def test_the_selected_weights_of_the_pipeline_change_and_no_others(
    method, tiny_pipeline, make_tiny_pipeline, tmp_path
):
    steps = []
    options = {**QUICK, "train_method": "xattn", **REQUIRED.get(method, {})}
    result = erase(
        tiny_pipeline,
        ["knife", "gun"],
        method,
        progress_bar=False,
        callback=steps.append,
        **options,
    ).pipeline
    assert result is tiny_pipeline and not result.unet.training
    before = make_tiny_pipeline().unet.state_dict()
    selected = set(select_parameters(result.unet, "xattn"))
    assert trained(before, result.unet.state_dict(), selected) == selected
    assert [(step.done, step.total) for step in steps] == [(1, 2), (2, 2)]
    assert {"erase", "concept_left", "drift"} <= steps[-1].measured.keys()


def test_a_folder_may_be_given_and_the_result_saved(tiny_model_folder, tmp_path):
    result = erase(
        Path(tiny_model_folder), ["knife"], "esd", output_dir=str(tmp_path / "out"), progress_bar=False, **QUICK
    ).pipeline
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert fingerprint(saved.unet) == fingerprint(result.unet)
    record = json.loads((tmp_path / "out" / "erasure.json").read_text())
    assert (record["method"], record["base_model"]) == ("esd", tiny_model_folder)


def test_the_pipeline_keeps_its_dtype_and_learns_in_float32(tiny_pipeline):
    tiny_pipeline.to(torch.bfloat16)
    before = tiny_pipeline.unet.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    erase(tiny_pipeline, ["knife"], progress_bar=False, **{**SDD, "ema_decay": 0.0})
    after = tiny_pipeline.unet.state_dict()
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_a_pipeline_in_half_precision_draws_its_validation_prompts_and_is_as_it_was(tiny_pipeline, tmp_path):
    tiny_pipeline.to(torch.bfloat16)
    tiny_pipeline.vae.train()
    erase(
        tiny_pipeline, ["knife"], output_dir=str(tmp_path), validation_prompts=["a knife"], progress_bar=False, **SDD
    )
    assert (tmp_path / "validation" / "step-2.png").is_file()
    parts = (tiny_pipeline.unet, tiny_pipeline.vae, tiny_pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert [part.training for part in parts] == [False, True, False]
    assert all(parameter.requires_grad for part in parts for parameter in part.parameters())


def test_calls_with_other_precisions_follow_each_other_and_leave_a_plain_denoiser(make_tiny_pipeline):
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 4, 32))
    for precision in ("bf16", None):
        pipeline = erase(
            make_tiny_pipeline(), ["knife"], mixed_precision=precision, progress_bar=False, **SDD
        ).pipeline
        plain = make_tiny_pipeline().unet
        plain.load_state_dict(pipeline.unet.state_dict())
        with torch.no_grad():
            assert difference(pipeline.unet(*inputs).sample, plain(*inputs).sample) < ROUNDING
        assert "forward" not in vars(pipeline.unet)


def test_adapters_of_another_are_refused_and_nothing_changes(tiny_pipeline):
    erase(tiny_pipeline, ["knife"], rank=2, progress_bar=False, **SDD)
    before = {name: value.clone() for name, value in tiny_pipeline.unet.state_dict().items()}
    for options in ({"rank": 2}, {}):
        with pytest.raises(ValueError, match="adapters already .erasure.; fuse or unload them first"):
            erase(tiny_pipeline, ["gun"], progress_bar=False, **SDD, **options)
    assert all(torch.equal(value, before[name]) for name, value in tiny_pipeline.unet.state_dict().items())
    assert not tiny_pipeline.unet.training


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_the_caller_has_gradients_off(mode, make_tiny_pipeline):
    expected = fingerprint(erase(make_tiny_pipeline(), ["knife"], progress_bar=False, **SDD).pipeline.unet)
    pipeline = make_tiny_pipeline()
    with mode():
        erase(pipeline, ["knife"], progress_bar=False, **SDD)
        assert not torch.is_grad_enabled()
    assert fingerprint(pipeline.unet) == expected


def test_it_runs_in_a_thread(tiny_pipeline):
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(erase, tiny_pipeline, ["knife"], progress_bar=False, **SDD).result()
    assert result.pipeline is tiny_pipeline


def test_nothing_is_written_without_an_output_folder(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    erase(tiny_pipeline, ["knife"], progress_bar=False, **{**SDD, "checkpointing_steps": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_preset_stands_for_options_that_are_not_given(make_tiny_pipeline):
    """The code of 2025 draws with the frozen model and steps at 5e-5: the same as saying so."""
    quick = {"num_inference_steps": 3, "max_train_steps": 2, "watch_prompts": ["a cat"], "progress_bar": False}
    said = {"sampling_model": "frozen", "learning_rate": 5e-5}
    preset, spelled, other = (
        fingerprint(erase(make_tiny_pipeline(), ["knife"], "esd", **quick, **options).pipeline.unet)
        for options in ({"preset": "esd-2025"}, said, {})
    )
    assert preset == spelled != other


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "mace"}, "method 'mace': unknown; allowed are concept_ablation, esd"),
        ({"concepts": 3}, "concepts 3: must be a list of texts"),
        ({"max_train_steps": True}, "max_train_steps True: must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate 'fast': must be a number"),
        ({"seed": None}, "seed None: must be a whole number"),
        ({"rank": 1000}, "rank 1000: must be at most 16, the full rank of the largest selected layer"),
        ({"colour": 1}, "colour: no option of method 'sdd'"),
        ({"concepts": []}, "at least one concept"),
        ({"learning_rates": 1}, r"learning_rates \(did you mean learning_rate\?\): no option of method 'sdd'"),
        ({"dry_run": True}, "dry_run: only for the command line"),
        ({"erase_from": "a painting"}, "erase_from: no option of method 'sdd'"),
        ({"train_method": "half"}, "train_method 'half': unknown"),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint latest: needs an output_dir"),
        ({"method": "esd", "preset": "esd-2026"}, "preset 'esd-2026': unknown"),
        ({"resolution": 60}, "resolution 60: must be a multiple of 8"),
        (
            {"concepts": ["knife " * 40]},
            "has 42 tokens; this model takes 32, and what is cut would not be trained$",
        ),
        ({"retain_prompts": ["cat " * 40], "rank": 2}, "has 42 tokens; this model takes 32"),
        ({"num_inference_steps": 2000}, "num_inference_steps"),
        ({"loss_space": "velocity"}, "loss_space velocity: the model predicts 'sample'"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained_moved_or_written(
    tiny_pipeline, tmp_path, monkeypatch, changes, message
):
    schedule = DDIMScheduler.from_config(tiny_pipeline.scheduler.config, prediction_type="sample")
    tiny_pipeline.register_modules(scheduler=schedule)
    before, touched = described(tiny_pipeline), []
    for part in (tiny_pipeline.unet, tiny_pipeline.vae, tiny_pipeline.text_encoder):
        monkeypatch.setattr(part, "to", lambda *arguments: touched.append(arguments))
    out = None if "resume_from_checkpoint" in changes else str(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        erase(**{"pipeline": tiny_pipeline, "concepts": ["knife"], "method": "sdd", "output_dir": out, **changes})
    monkeypatch.undo()
    assert described(tiny_pipeline) == before and touched == []
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_too_long_is_told_before_a_folder_is_loaded(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_safe.erasure.run.load_pipeline", None)
    with pytest.raises(ValueError, match="has 42 tokens; this model takes 32"):
        erase(tiny_model_folder, ["knife " * 40], output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def described(pipeline):
    """What a caller can see of a pipeline's parts."""
    unet, parts = pipeline.unet, (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    learns = [parameter.requires_grad for part in parts for parameter in part.parameters()]
    return (
        [(fingerprint(part), part.training, list(part.state_dict())) for part in parts],
        (learns, vars(unet).get("forward"), getattr(unet, "peft_config", None), unet.is_gradient_checkpointing),
    )


class Stopped(Exception):
    pass


def stop_at(step, *_):
    raise Stopped


@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_that_fails_leaves_the_pipeline_as_it_was(make_tiny_pipeline, tmp_path, rank):
    pipeline = make_tiny_pipeline()
    before = described(pipeline)
    options = {**SDD, "rank": rank, "mixed_precision": "bf16", "gradient_checkpointing": True}
    with pytest.raises(Stopped):
        erase(pipeline, ["knife"], progress_bar=False, callback=stop_at, **options)
    assert described(pipeline) == before

    folder = str(tmp_path)
    erase(make_tiny_pipeline(), ["knife"], output_dir=folder, checkpointing_steps=1, progress_bar=False, **SDD)
    options |= {"seed": 1, "mixed_precision": None, "resume_from_checkpoint": f"{folder}/checkpoint-1"}
    with pytest.raises(ValueError, match="the checkpoint is of another run"):
        erase(pipeline, ["knife"], output_dir=f"{folder}/other", progress_bar=False, **options)
    assert described(pipeline) == before


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_the_callers_random_generators_go_on_where_they_were(tiny_pipeline):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random_states()
    seen = []
    erase(tiny_pipeline, ["knife"], progress_bar=False, callback=lambda *_: seen.append(random_states()), **SDD)
    assert random_states() == before != seen[0]  # a run has its own
    with pytest.raises(Stopped):
        erase(tiny_pipeline, ["knife"], progress_bar=False, callback=stop_at, **SDD)
    assert random_states() == before


def test_gradients_are_recomputed_during_the_run_only(tiny_pipeline):
    seen = []
    erase(
        tiny_pipeline, ["knife"], progress_bar=False, gradient_checkpointing=True,
        callback=lambda *_: seen.append(tiny_pipeline.unet.is_gradient_checkpointing), **SDD,
    )  # fmt: skip
    assert seen == [True, True] and not tiny_pipeline.unet.is_gradient_checkpointing


def test_a_concept_whose_predictions_are_those_of_no_text_is_reported(make_tiny_pipeline, caplog):
    deaf = make_tiny_pipeline()
    for name, parameter in deaf.unet.named_parameters():
        if "attn2.to_out" in name:
            torch.nn.init.zeros_(parameter.data)
    erase(deaf, ["knife"], **ONE_STEP)
    assert caplog.messages == [
        "concepts 'knife': its predictions equal the empty prompt's, so there is nothing to erase"
    ]
    caplog.clear()
    erase(make_tiny_pipeline(), "knife", **ONE_STEP)
    assert not caplog.messages


def test_values_of_other_types_that_mean_the_same(make_tiny_pipeline):
    plain, texts = (
        fingerprint(erase(make_tiny_pipeline(), concepts, **ONE_STEP, **options).pipeline.unet)
        for concepts, options in (
            (["knife"], {"learning_rate": 1e-3, "retain_prompts": ["dog"], "seed": 3}),
            ("knife", {"learning_rate": "1e-3", "retain_prompts": "dog", "seed": np.int64(3)}),
        )
    )
    assert plain == texts
