"""SDD on SD 2.x and SDXL through the command's `main`: the loss, what is saved, resuming, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from closeness import ROUNDING, difference, trained
from diffusers_safe.diffusion.generators import sample_generator
from diffusers_safe.diffusion.trajectories import Trajectories
from diffusers_safe.families import make_family
from diffusers_safe.formats import PARTIAL_NAME, load_partial
from diffusers_safe.provenance import Provenance
from diffusers_safe.training.sdd import main
from diffusers_safe.weights.trained import select_parameters
from scripts import accelerate_on_cpu


UNET = "unet/diffusion_pytorch_model.safetensors"
CLASSES = {"sd-2": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
STEPS, RESOLUTION, SEED = 4, 48, 2


def train(model, output_dir, **changes):
    chosen = {
        "pretrained_model_name_or_path": model,
        "concepts": "knife",
        "output_dir": output_dir,
        "resolution": RESOLUTION,
        "num_inference_steps": 5,
        "max_train_steps": STEPS,
        "learning_rate": 1e-2,
        "ema_decay": 0.5,
        "watch_prompts": "a cat",
        "checkpointing_steps": 2,
        "seed": SEED,
        "save": "both",
        **changes,
    }
    with accelerate_on_cpu():
        main([word for name, value in chosen.items() for word in (f"--{name}", str(value))])


@pytest.fixture(scope="module")
def models(make_tiny_sd_2_pipeline, make_tiny_xl_pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_tiny_sd_2_pipeline().save_pretrained(root / "sd-2")
    make_tiny_xl_pipeline().save_pretrained(root / "xl")
    return root


@pytest.fixture(scope="module", params=CLASSES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def erased(family, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("erased") / family
    train(models / family, folder)
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a knife", num_inference_steps=3, generator=generator, output_type="np").images


def test_the_first_loss_is_what_the_stock_pipeline_and_its_unet_give(family, models, erased):
    """SDD's equation with nothing of ours but the draws: the pipeline's own call brings a latent to where training
    stopped, and its UNet predicts with the pipeline's own embeddings. What a v model predicts is compared as v."""
    pipeline = CLASSES[family].from_pretrained(models / family)
    pipeline.set_progress_bar_config(disable=True)
    generator = sample_generator(SEED, "erase", 0)
    shape = (4, RESOLUTION // 8, RESOLUTION // 8)
    (steps,) = Trajectories(make_family(pipeline).make_scheduler, shape, 5).draw_stops(generator)
    assert steps == 3  # of 5, by the seed: not the initial noise
    noise = torch.randn((1, *shape), generator=generator)
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    size = {"height": RESOLUTION, "width": RESOLUTION}
    pipeline("knife", latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent", **size)
    hook.remove()
    with torch.no_grad():
        args, kwargs = seen[steps]
        uncond, cond = pipeline.unet(*args, **kwargs)[0].chunk(2)
    first = rows(erased)[0]
    assert first["step"] == 1 and first["erase"] == pytest.approx((uncond - cond).square().mean().item(), rel=1e-3)
    assert first["erase"] > 1e-6


def test_the_result_is_a_stock_pipeline_of_its_class(family, models, erased):
    index, base = (json.loads((folder / "model_index.json").read_text()) for folder in (erased, models / family))
    assert {name: value for name, value in index.items() if name != "_name_or_path"} == {
        name: value for name, value in base.items() if name != "_name_or_path"
    }
    before = picture(CLASSES[family].from_pretrained(models / family))
    for cls in (CLASSES[family], DiffusionPipeline):
        pipeline = cls.from_pretrained(erased)
        assert type(pipeline) is CLASSES[family]
        image = picture(pipeline)
        assert image.shape == (1, 64, 64, 3) and difference(image, before) > 10 * ROUNDING
    if family == "xl":
        assert pipeline.config.force_zeros_for_empty_prompt
    assert Provenance.load(erased).arguments["resolution"] == RESOLUTION


def test_only_the_selected_weights_of_the_unet_left_the_base(family, models, erased):
    before, after = load_file(models / family / UNET), load_file(erased / UNET)
    selected = set(select_parameters(CLASSES[family].from_pretrained(models / family).unet, "xattn"))
    assert trained(before, after, selected) == selected
    for path in (models / family).rglob("*.safetensors"):
        name = path.relative_to(models / family)
        assert str(name) == UNET or path.read_bytes() == (erased / name).read_bytes()


def test_the_erased_weights_on_the_base_draw_the_same_picture(family, models, erased):
    base = CLASSES[family].from_pretrained(models / family)
    load_partial(base.unet, erased / PARTIAL_NAME)
    assert difference(picture(base), picture(CLASSES[family].from_pretrained(erased))) < ROUNDING


def test_a_resumed_run_ends_where_the_whole_one_does(family, models, erased, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(erased / "checkpoint-2", out / "checkpoint-2")
    shutil.copy(erased / "log.jsonl", out)
    train(models / family, out, resume_from_checkpoint="latest")
    assert (out / UNET).read_bytes() == (erased / UNET).read_bytes()
    assert rows(out) == rows(erased)


def test_a_run_of_another_resolution_does_not_continue_this_one(family, models, erased, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(erased / "checkpoint-2", out / "checkpoint-2")
    with pytest.raises(SystemExit) as error:
        train(models / family, out, resume_from_checkpoint="latest", resolution=64)
    assert error.value.code == 2 and "another run: resolution 48 there, 64 here" in capsys.readouterr().err


def refused(capsys, model, output_dir, **changes):
    with pytest.raises(SystemExit) as stop:
        train(model, output_dir, **changes)
    assert stop.value.code == 2 and not Path(output_dir).exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_does_not_fit_the_model_is_told_before_anything_is_loaded_or_written(family, models, tmp_path, capsys):
    """The folder has no weights: whoever loads them fails otherwise."""
    model = tmp_path / "model"
    shutil.copytree(models / family, model, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "resolution 50: must be a multiple of 8" in refused(capsys, model, tmp_path / "out", resolution=50)
    assert "resolution 0: must be at least 1" in refused(capsys, model, tmp_path / "out", resolution=0)
    if family == "xl":
        line = refused(capsys, model, tmp_path / "out", train_method="xlayer")
        assert "train_method 'xlayer'" in line and "noxattn" in line
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    assert "in_channels 9: must be 4" in refused(capsys, model, tmp_path / "out")
