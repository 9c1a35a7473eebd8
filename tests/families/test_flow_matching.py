"""Everything that is done with a model, for each family of flow matching: erased, saved, loaded, generated with."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusion3Pipeline
from torch.testing import assert_close

from diffusers_safe import (
    ErasedFluxPipeline,
    ErasedStableDiffusion3Pipeline,
    cli,
    erase,
)
from diffusers_safe.families import make_family
from diffusers_safe.formats import PARTIAL_NAME


CLASSES = {
    "sd-3": (StableDiffusion3Pipeline, ErasedStableDiffusion3Pipeline),
    "flux": (FluxPipeline, ErasedFluxPipeline),
}
TRAINING = {"max_train_steps": 2, "num_inference_steps": 4, "resolution": 64}


@pytest.fixture(params=CLASSES)
def name(request):
    return request.param


@pytest.fixture
def pipeline(name, make_tiny_sd3_pipeline, make_tiny_flux_pipeline):
    pipeline = {"sd-3": make_tiny_sd3_pipeline, "flux": make_tiny_flux_pipeline}[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def draw(pipeline, prompt="a knife"):
    """Latents, without rounding."""
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipeline(prompt, height=64, width=64, **options).images


def test_a_scheduler_of_diffusion_is_refused(pipeline):
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="^scheduler DDIMScheduler: "):
        make_family(pipeline)


@pytest.mark.parametrize("method, options", [
    ("esd", {}),
    ("sdd", {"retain_prompts": ["a cat"]}),
    ("sdd", {"rank": 2}),
    ("concept_ablation", {"anchor_prompt": "a tree"}),
    ("esd", {"train_method": "text-encoders"}),
])  # fmt: skip
def test_the_result_of_a_training_is_what_a_stock_pipeline_loads(method, options, name, pipeline, folder, tmp_path):
    out, stock_class = tmp_path / "out", CLASSES[name][0]
    erasure = erase(pipeline, ["knife"], method, progress_bar=False, output_dir=str(out), **TRAINING, **options)
    assert erasure.record.concepts == ["knife"] and erasure.weights
    stock = stock_class.from_pretrained(out if (out / "model_index.json").exists() else folder)
    if "rank" in options:
        stock.load_lora_weights(out)
    before, stored, erased = (draw(one) for one in (stock_class.from_pretrained(folder), stock, erasure.pipeline))
    assert_close(stored, erased, rtol=1e-3, atol=1e-4)
    assert not torch.equal(before, erased)


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_published_closed_forms_edit_the_tokens_alone(method, pipeline):
    assert erase(pipeline, ["knife", "gun"], method, resolution=64).weights.keys() == {"context_embedder.weight"}


def test_a_method_that_edits_values_alone_says_that_there_are_none(pipeline):
    with pytest.raises(ValueError, match="no values of cross-attention that could be edited"):
        erase(pipeline, ["knife"], "speed")


def test_the_whole_way_of_a_stored_model(name, folder, tmp_path, capsys):
    stock_class, erased_class = CLASSES[name]
    known = ["--pretrained_model_name_or_path", folder, "--concepts", "knife", "--resolution", "64"]
    cli.main(["erase", "--method", "sdd", *known, "--output_dir", str(tmp_path / "dry"), "--dry_run"])
    printed = capsys.readouterr().out
    assert "train" in printed and "PFLOP" in printed and not (tmp_path / "dry").exists()
    out, lora = str(tmp_path / "out"), str(tmp_path / "lora")
    cli.main(["erase", "--method", "text_edit", *known, "--output_dir", out, "--save", "both"])
    assert json.loads((tmp_path / "out" / "erasure.json").read_text())["concepts"] == ["knife"]
    cli.main(["export", out, "--to", "lora", "--rank", "16", "--base_model", folder, "--output_dir", lora])
    cli.main(["generate", "--model", out, "--prompts", "a knife", "--output_dir", str(tmp_path / "images"),
              "--num_inference_steps", "2", "--height", "64", "--width", "64"])  # fmt: skip
    assert len(list((tmp_path / "images").rglob("*.png"))) == 1

    base, stock = (stock_class.from_pretrained(path) for path in (folder, out))
    before, after = draw(base), draw(stock)
    base.load_lora_weights(lora)  # the rank is that of the layers
    assert_close(draw(base), after, rtol=1e-3, atol=1e-4)
    assert not torch.equal(before, after)
    for source in (out, str(tmp_path / "out" / PARTIAL_NAME), lora):
        erased = erased_class.from_pretrained(source, base_model=folder)
        assert erased.erasure.concepts == ["knife"]
        assert_close(draw(erased), after, rtol=1e-3, atol=1e-4)
        with erased.erasure_disabled():
            assert_close(draw(erased), before, rtol=1e-3, atol=1e-4)
