"""`diffusers_safe.erase`, the way from Python."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_safe import erase
from diffusers_safe.provenance import fingerprint
from diffusers_safe.training.erasure_arguments import METHODS
from diffusers_safe.weights import select_parameters


pytestmark = pytest.mark.usefixtures("on_cpu")
QUICK = {"max_train_steps": 2, "num_inference_steps": 3, "learning_rate": 1e-3, "watch_prompts": ["a cat"]}


@pytest.mark.parametrize("method", METHODS)
def test_the_selected_weights_of_the_pipeline_change_and_no_others(
    method, tiny_pipeline, make_tiny_pipeline, tmp_path
):
    steps = []
    result = erase(
        tiny_pipeline, ["knife", "gun"], method, progress_bar=False, callback=lambda *call: steps.append(call), **QUICK
    )
    assert result is tiny_pipeline and not result.unet.training
    before = make_tiny_pipeline().unet.state_dict()
    changed = {name for name, value in result.unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(select_parameters(result.unet, "xattn"))
    assert [number for number, _ in steps] == [1, 2]
    assert {"erase", "concept_left", "drift"} <= steps[-1][1].keys()


def test_a_folder_may_be_given_and_the_result_saved(tiny_model_folder, tmp_path):
    result = erase(tiny_model_folder, ["knife"], "esd", output_dir=str(tmp_path / "out"), progress_bar=False, **QUICK)
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert fingerprint(saved.unet) == fingerprint(result.unet)
    record = json.loads((tmp_path / "out" / "erasure.json").read_text())
    assert (record["method"], record["base_model"]) == ("esd", tiny_model_folder)


def test_the_pipeline_keeps_its_dtype_and_learns_in_float32(tiny_pipeline):
    tiny_pipeline.to(torch.bfloat16)
    before = tiny_pipeline.unet.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    erase(tiny_pipeline, ["knife"], progress_bar=False, **{**QUICK, "ema_decay": 0.0})
    after = tiny_pipeline.unet.state_dict()
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_a_pipeline_in_half_precision_draws_its_validation_prompts_and_is_as_it_was(tiny_pipeline, tmp_path):
    tiny_pipeline.to(torch.bfloat16)
    tiny_pipeline.vae.train()
    erase(
        tiny_pipeline, ["knife"], output_dir=str(tmp_path), validation_prompts=["a knife"], progress_bar=False, **QUICK
    )
    assert (tmp_path / "validation" / "step-2.png").is_file()
    parts = (tiny_pipeline.unet, tiny_pipeline.vae, tiny_pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert [part.training for part in parts] == [False, True, False]
    assert all(parameter.requires_grad for part in parts for parameter in part.parameters())


def test_calls_with_other_precisions_follow_each_other_and_leave_a_plain_denoiser(make_tiny_pipeline):
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 4, 32))
    for precision in ("bf16", None):
        pipeline = erase(make_tiny_pipeline(), ["knife"], mixed_precision=precision, progress_bar=False, **QUICK)
        plain = make_tiny_pipeline().unet
        plain.load_state_dict(pipeline.unet.state_dict())
        with torch.no_grad():
            assert torch.equal(pipeline.unet(*inputs).sample, plain(*inputs).sample)


def test_adapters_of_another_are_refused_and_nothing_changes(tiny_pipeline):
    erase(tiny_pipeline, ["knife"], rank=2, progress_bar=False, **QUICK)
    before = {name: value.clone() for name, value in tiny_pipeline.unet.state_dict().items()}
    for options in ({"rank": 2}, {}):
        with pytest.raises(ValueError, match="adapters already .erasure.; fuse or unload them first"):
            erase(tiny_pipeline, ["gun"], progress_bar=False, **QUICK, **options)
    assert all(torch.equal(value, before[name]) for name, value in tiny_pipeline.unet.state_dict().items())
    assert not tiny_pipeline.unet.training


def test_it_runs_in_a_thread(tiny_pipeline):
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(erase, tiny_pipeline, ["knife"], progress_bar=False, **QUICK).result()
    assert result is tiny_pipeline


def test_nothing_is_written_without_an_output_folder(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    erase(tiny_pipeline, ["knife"], progress_bar=False, **{**QUICK, "checkpointing_steps": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_preset_stands_for_options_that_are_not_given(make_tiny_pipeline):
    """The code of 2025 draws with the frozen model and steps at 5e-5: the same as saying so."""
    quick = {"num_inference_steps": 3, "max_train_steps": 2, "watch_prompts": ["a cat"], "progress_bar": False}
    said = {"sampling_model": "frozen", "learning_rate": 5e-5}
    preset, spelled, other = (
        fingerprint(erase(make_tiny_pipeline(), ["knife"], "esd", **quick, **options).unet)
        for options in ({"preset": "esd-2025"}, said, {})
    )
    assert preset == spelled != other


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "uce"}, "method 'uce': unknown; allowed are esd, sdd"),
        ({"concepts": "knife"}, "must be a list of names"),
        ({"concepts": []}, "at least one concept"),
        ({"learning_rates": 1}, "learning_rates: no option of method 'sdd'"),
        ({"dry_run": True}, "dry_run: only for the script"),
        ({"erase_from": "a painting"}, "erase_from: no option of method 'sdd'"),
        ({"train_method": "half"}, "train_method 'half': unknown"),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint latest: needs an output_dir"),
        ({"method": "esd", "preset": "esd-2026"}, "preset 'esd-2026': unknown"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(tiny_pipeline, changes, message):
    before = fingerprint(tiny_pipeline.unet)
    with pytest.raises(ValueError, match=message):
        erase(**{"pipeline": tiny_pipeline, "concepts": ["knife"], **changes})
    assert fingerprint(tiny_pipeline.unet) == before
