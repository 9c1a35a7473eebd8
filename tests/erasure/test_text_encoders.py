"""Erasures that train the text encoders instead of the denoiser: `--train_method text-encoders`."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_safe import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline, erase
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.plan import make_plan
from diffusers_safe.families import TextEncoders, make_family
from diffusers_safe.formats.export import export
from diffusers_safe.generation.generate import GenerationSettings, sample_images
from diffusers_safe.methods.predictor import Predictor
from diffusers_safe.provenance import Provenance
from diffusers_safe.training.sdd import main
from diffusers_safe.weights.trained import TrainedWeights, select_parameters
from scripts import run_main
from toy_family import build_toy_pipeline, registered


OPTIONS = {
    "concepts": ["knife"],
    "train_method": "text-encoders",
    "num_inference_steps": 4,
    "max_train_steps": 4,
    "learning_rate": 1e-2,
    "ema_decay": 0.5,
    "watch_prompts": ["a cat"],
}


@pytest.fixture(scope="module", params=["sd", "xl"])
def model(request, make_tiny_pipeline, make_tiny_xl_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / request.param
    (make_tiny_pipeline if request.param == "sd" else make_tiny_xl_pipeline)().save_pretrained(folder)
    return folder


def train(model, output_dir, **changes):
    run_main(main, pretrained_model_name_or_path=model, output_dir=output_dir, **{**OPTIONS, **changes})


@pytest.fixture(scope="module")
def erased(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("erased") / "out"
    train(model, folder, checkpointing_steps=2)
    return folder


def states(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    return pipeline.unet.state_dict(), {name: getattr(pipeline, name).state_dict() for name in encoders}


def test_a_stock_pipeline_loads_the_result_and_only_its_text_encoders_changed(model, erased):
    unet, encoders = states(model)
    erased_unet, erased_encoders = states(erased)
    assert all(torch.equal(unet[name], erased_unet[name]) for name in unet)
    for name, before in encoders.items():
        assert any(not torch.equal(before[key], erased_encoders[name][key]) for key in before)
    record = Provenance.load(erased)
    assert (record.train_method, record.arguments["train_method"]) == ("text-encoders", "text-encoders")


def test_a_run_continues_from_a_checkpoint_with_the_same_result(model, erased, tmp_path):
    train(model, tmp_path / "out", max_train_steps=2, checkpointing_steps=1)
    train(model, tmp_path / "out", resume_from_checkpoint="latest")
    _, once = states(erased)
    _, resumed = states(tmp_path / "out")
    for name, state in once.items():
        for key, value in state.items():
            torch.testing.assert_close(resumed[name][key], value)


@pytest.mark.parametrize("make", ["make_tiny_pipeline", "make_tiny_xl_pipeline", "toy"])
def test_student_and_frozen_predictions_are_those_of_their_encoders(make, request):
    with registered():
        pipeline = build_toy_pipeline() if make == "toy" else request.getfixturevalue(make)()
        family = make_family(pipeline)
        module = TextEncoders.of(family)
        weights = TrainedWeights(module, select_parameters(module, "text-encoders"))
        family.denoiser.requires_grad_(False)
        predictor = Predictor(family, weights, ["a knife"], student=module)
        inputs = torch.randn(1, *family.latent_shape), torch.tensor([500.0])
        frozen = predictor(*inputs, ["a knife"], "frozen")
        predictor(*inputs, ["a knife"], "student").sum().backward()
        reached = {name.split(".")[0] for name, value in weights.student.items() if value.grad is not None}
        assert reached == set(family.text_encoders)
        assert all(parameter.grad is None for parameter in family.denoiser.parameters())

        with torch.no_grad():
            for value in weights.student.values():
                value.mul_(0.5)
            student = predictor(*inputs, ["a knife"], "student")
            expected = family.predict(family.denoiser, *inputs, family.encode(["a knife"]))
        torch.testing.assert_close(student, expected)
        assert not torch.allclose(student, frozen)
        torch.testing.assert_close(predictor(*inputs, ["a knife"], "frozen"), frozen)


def test_esd_erases_from_a_loaded_pipeline_and_can_be_disabled(make_tiny_pipeline):
    pipeline = make_tiny_pipeline()
    values = {name: value for name, value in OPTIONS.items() if name not in ("concepts", "ema_decay")}
    before = generate(pipeline)
    erasure = erase(pipeline, ["knife"], method="esd", retain_prompts=["a cat"], **values)
    assert all(name.startswith("text_encoder.") for name in erasure.weights)
    assert generate(pipeline) != before
    with erasure.disabled():
        assert generate(pipeline) == before
    with pytest.raises(ValueError, match="form 'partial'.*full"):
        erasure.save("anywhere", "partial")


def test_checkpointed_activations_give_the_same_weights(make_tiny_pipeline):
    values = {name: value for name, value in OPTIONS.items() if name not in ("concepts", "ema_decay")}
    plain, checkpointed = (
        erase(make_tiny_pipeline(), ["knife"], method="esd", gradient_checkpointing=on, **values).weights
        for on in (False, True)
    )
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value)


def test_in_mixed_precision_denoiser_and_encoders_compute_in_bfloat16(make_tiny_pipeline):
    pipeline, seen = make_tiny_pipeline(), {"unet": set(), "text_encoder": set()}
    for name, layer in (("unet", pipeline.unet.conv_in), ("text_encoder", last_linear(pipeline.text_encoder))):
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen[name].add(output.dtype))
    values = {"train_method": "text-encoders", "num_inference_steps": 4, "max_train_steps": 1, "watch_prompts": []}
    erasure = erase(pipeline, ["knife"], method="esd", mixed_precision="bf16", **values)
    assert seen["unet"] == {torch.bfloat16} and torch.bfloat16 in seen["text_encoder"]
    assert all(value.dtype == torch.float32 for value in erasure.weights.values())


def last_linear(module):
    return [part for part in module.modules() if isinstance(part, torch.nn.Linear)][-1]


def generate(pipeline):
    return sample_images(pipeline, ["a knife"], [0], GenerationSettings(2))[0]


def test_the_plan_counts_the_text_encoders(model, tmp_path):
    known = {"pretrained_model_name_or_path": str(model), "output_dir": str(tmp_path)}
    plan = make_plan(make_options("sdd", **known, **OPTIONS))
    pipeline = DiffusionPipeline.from_pretrained(model)
    module = TextEncoders.of(make_family(pipeline))
    assert plan.selected[1] == sum(parameter.numel() for parameter in module.parameters())
    assert plan.memory["model"] == 4 * (plan.selected[1] + sum(p.numel() for p in pipeline.unet.parameters()))
    assert plan.backwards == 1 and plan.flops > 0


@pytest.mark.parametrize(
    "changes, processes, words",
    [
        ({"rank": 4}, 1, ["rank 4", "text-encoders"]),
        ({"save": "partial"}, 1, ["save 'partial'", "full"]),
        ({"save": "unet"}, 1, ["save 'unet'", "full"]),
        ({}, 2, ["train_method text-encoders", "one process"]),
    ],
)
def test_what_it_cannot_do_is_refused_before_work_starts(
    model, tmp_path, capsys, monkeypatch, changes, processes, words
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit) as stopped:
        train(model, tmp_path / "out", **changes)
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and all(word in printed for word in words)
    assert not (tmp_path / "out").exists()


def test_export_says_that_there_is_no_other_format(erased, tmp_path):
    with pytest.raises(ValueError, match="text encoders were erased"):
        export(str(erased), str(tmp_path / "lora"), "lora")
    assert json.loads((erased / "erasure.json").read_text())["train_method"] == "text-encoders"


def test_an_erased_pipeline_does_not_give_the_base_models_text_encoders_back(erased):
    kind = ErasedStableDiffusionXLPipeline if (erased / "text_encoder_2").is_dir() else ErasedStableDiffusionPipeline
    pipeline = kind.from_pretrained(str(erased))
    with pytest.raises(ValueError, match="the text encoders were erased, not the denoiser; load .* instead"):
        with pipeline.erasure_disabled():
            pass
