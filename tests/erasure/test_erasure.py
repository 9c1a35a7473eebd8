"""What `erase()` returns: saved, disabled, published, and what it refuses."""

import os
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_safe import ErasedStableDiffusionPipeline, erase
from diffusers_safe.families import load_pipeline
from diffusers_safe.provenance import fingerprint


pytestmark = pytest.mark.usefixtures("on_cpu")
SDD = {
    "method": "sdd",
    "max_train_steps": 2,
    "num_inference_steps": 3,
    "learning_rate": 1e-2,
    "ema_decay": 0.0,
    "progress_bar": False,
}


@pytest.fixture
def model(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


@pytest.mark.parametrize("rank", [None, 2])
def test_it_is_saved_in_every_form_and_disabled_in_between(rank, model, tmp_path):
    base = fingerprint(StableDiffusionPipeline.from_pretrained(model).unet)
    erasure = erase(str(model), ["knife"], rank=rank, **SDD)
    with erasure.disabled() as pipeline:
        if rank is None:
            assert fingerprint(pipeline.unet) == base
        with pytest.raises(ValueError, match="is disabled here"):
            erasure.save(tmp_path / "no", "full")
    for form in ("lora", "full", "both", "denoiser") if rank else (None, "partial", "both", "denoiser"):
        erasure.save(tmp_path / f"{form}", form)
        assert (tmp_path / f"{form}" / "erasure.json").is_file()
    both = ErasedStableDiffusionPipeline.from_pretrained(tmp_path / "both")
    assert both.erasure.concepts == ["knife"]
    assert "knife" in repr(erasure) and "concept left" in erasure._repr_html_()
    with pytest.raises(ValueError, match="form 'onnx': unknown; allowed are"):
        erasure.save(tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match="overwrite 'maybe': must be true or false"):
        erasure.save(tmp_path / "x", overwrite="maybe")


def test_the_base_model_is_not_written_over(model):
    erasure = erase(str(model), ["knife"], **SDD)
    for place in (model, model / "unet", model / "erased"):
        with pytest.raises(ValueError, match="the base model"):
            erasure.save(place, overwrite=True)
    assert not (model / ".replaced-1").exists()


def test_a_pipeline_that_moved_meanwhile_is_whole(model):
    erasure = erase(str(model), ["knife"], **SDD)
    with erasure.disabled() as pipeline:
        pipeline.to(torch.bfloat16)
    assert {value.dtype for value in erasure.pipeline.unet.parameters()} == {torch.bfloat16}


def test_a_second_erasure_of_a_pipeline_does_not_pass_for_one_of_the_base_model(model, tmp_path, caplog):
    pipeline = load_pipeline(str(model))
    first = erase(pipeline, ["knife"], **SDD)
    second = erase(pipeline, ["a gun"], **SDD)
    assert second.record.base_model == "a pipeline in memory" and "was erased before" in caplog.text
    with pytest.raises(ValueError, match="was erased again since"):
        first.save(tmp_path / "first")
    second.save(tmp_path / "second")


def test_a_fused_lora_is_saved_once(model, tmp_path):
    pipeline = load_pipeline(str(model))
    erasure = erase(pipeline, ["knife"], rank=2, **SDD)
    erasure.save(tmp_path / "before", "full")
    pipeline.fuse_lora()
    erasure.save(tmp_path / "after", "full")
    before, after = (StableDiffusionPipeline.from_pretrained(tmp_path / name).unet for name in ("before", "after"))
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_a_fused_lora_is_not_disabled(model):
    erasure = erase(load_pipeline(str(model)), ["knife"], rank=2, **SDD)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 4, 32))
    base = load_pipeline(str(model)).unet(*inputs).sample
    erasure.pipeline.fuse_lora()
    with pytest.raises(ValueError, match="is fused, so it cannot be disabled; call unfuse_lora first"):
        with erasure.disabled():
            pass
    erasure.pipeline.unfuse_lora()
    with erasure.disabled() as pipeline:
        torch.testing.assert_close(pipeline.unet(*inputs).sample, base, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", [
    lambda pipeline: pipeline.fuse_lora(lora_scale=0.5), lambda pipeline: pipeline.disable_lora(),
    lambda pipeline: pipeline.set_adapters("erasure", 0.1),
])  # fmt: skip
def test_a_weaker_lora_is_not_saved_as_the_erasure(change, model, tmp_path):
    erasure = erase(load_pipeline(str(model)), ["knife"], rank=2, **SDD)
    change(erasure.pipeline)
    with pytest.raises(ValueError, match="it was unloaded, disabled or scaled; undo that first"):
        erasure.save(str(tmp_path / "out"), "full")
    assert not (tmp_path / "out").exists()


def test_a_lora_that_is_gone_is_not_saved(model, tmp_path):
    pipeline = load_pipeline(str(model))
    erasure = erase(pipeline, ["knife"], rank=2, **SDD)
    pipeline.unload_lora_weights()
    with pytest.raises(ValueError, match="not active in the pipeline as it was trained"):
        erasure.save(tmp_path / "x")


def test_a_preset_is_known_in_any_spelling(make_tiny_pipeline):
    steps = []
    for preset in ("esd-2025", "ESD_2025"):
        options = {"preset": preset, "max_train_steps": 1, "num_inference_steps": 3, "progress_bar": False}
        erasure = erase(make_tiny_pipeline(), ["knife"], "esd", callback=steps.append, **options)
        assert erasure.record.arguments["learning_rate"] == 5e-5
    with pytest.raises(ValueError, match="preset \\(list\\): must be text"):
        erase(make_tiny_pipeline(), ["knife"], "esd", preset=["esd-2025"])


def test_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"pipeline \(object\): must be a DiffusionPipeline"):
        erase(object(), ["knife"])


def test_one_erasure_of_a_pipeline_at_a_time(model):
    pipeline = load_pipeline(str(model))

    def again(progress):
        erase(pipeline, ["a dog"], **SDD)

    with pytest.raises(ValueError, match="is being erased, or its erasure is disabled"):
        erase(pipeline, ["a cat"], callback=again, **SDD)
    erasure = erase(pipeline, ["a cat"], **SDD)
    with erasure.disabled(), pytest.raises(ValueError, match="is being erased, or its erasure is disabled"):
        erase(pipeline, ["a dog"], **SDD)
    assert erase(pipeline, ["a dog"], **SDD).record.concepts == ["a dog"]


@pytest.mark.parametrize("place", ["tokenizer/tokenizer_config.json", "unet/config.json", "notes"])
def test_a_pipe_in_a_models_folder_is_an_error(place, model):
    path = model / place
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        erase(str(model), ["knife"], **SDD)
