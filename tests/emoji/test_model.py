"""The embedded model and its judges: their files, and what they generate and recognise."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_safe.embedded import EMBEDDED_MODELS
from diffusers_safe.emoji import JUDGE_FOLDERS, MODEL_FOLDER
from diffusers_safe.emoji.classifier import EmojiClassifier
from diffusers_safe.emoji.evaluation import SETTINGS
from diffusers_safe.emoji.render import render_many
from diffusers_safe.emoji.scenes import UPRIGHT, VARIED


PROMPTS = {
    "a knife": ("object", "knife"),
    "a panda": ("object", "panda"),
    "an apple on a blue background": ("object", "apple"),
    "a car": ("object", "car"),
    "a tree": ("object", "tree"),
    "a pizza": ("object", "pizza"),
}


@pytest.fixture(scope="module", params=EMBEDDED_MODELS)
def pipeline(request):
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED_MODELS[request.param])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, seed=0):
    images = pipeline(
        prompts,
        num_inference_steps=SETTINGS.num_inference_steps,
        guidance_scale=SETTINGS.guidance_scale,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
    ).images
    return np.stack([np.asarray(image) for image in images])


def test_both_judges_recognise_generated_images(pipeline):
    pictures = draw(pipeline, list(PROMPTS))
    for folder in JUDGE_FOLDERS:
        seen = EmojiClassifier.from_pretrained(folder).classify(pictures)
        right = [seen[head][i] == label for i, (head, label) in enumerate(PROMPTS.values())]
        assert sum(right) >= 5, seen["object"]


@pytest.mark.parametrize("variation", [UPRIGHT, VARIED], ids=["upright", "varied"])
@pytest.mark.parametrize("folder", JUDGE_FOLDERS, ids=lambda folder: folder.name)
def test_a_judge_recognises_fresh_renders(folder, variation):
    pictures, scenes = render_many(1, 0, 60, variation=variation)
    seen = EmojiClassifier.from_pretrained(folder).classify(pictures)
    assert np.mean([name == scene.name for name, scene in zip(seen["object"], scenes)]) >= 0.95
    assert np.mean([name == scene.background for name, scene in zip(seen["background"], scenes)]) >= 0.9


def test_the_unet_is_that_of_stable_diffusion_scaled_down():
    pipeline = DiffusionPipeline.from_pretrained(MODEL_FOLDER)
    unet = pipeline.unet.config
    assert tuple(unet.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert tuple(unet.up_block_types) == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    assert unet.mid_block_type == "UNetMidBlock2DCrossAttn" and unet.layers_per_block == 2
    assert unet.in_channels == unet.out_channels == 8 == pipeline.vae.config.latent_channels
    assert not unet.use_linear_projection and unet.class_embed_type is None and unet.addition_embed_type is None
    scheduler = pipeline.scheduler.config
    assert scheduler.prediction_type == "epsilon" and scheduler.num_train_timesteps == 1000
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_the_folder_loads_without_this_package(name):
    index = json.loads((EMBEDDED_MODELS[name] / "model_index.json").read_text())
    libraries = {value[0] for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    assert index["_class_name"] in ("StableDiffusionPipeline", "StableDiffusion3Pipeline")
    assert libraries <= {"diffusers", "transformers", None}


def shipped():
    return [path for path in MODEL_FOLDER.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_everything_shipped_is_small_and_safe_to_load():
    files = shipped()
    assert sum(path.stat().st_size for path in files) <= 60_000_000
    allowed = {".py", ".png", ".txt", ".md", ".json", ".safetensors"}
    assert {path.suffix for path in files} <= allowed  # no pickles
    assert not any(path.name.startswith(".") for path in files)


def test_all_weights_are_in_half_precision_and_finite():
    files = [path for path in shipped() if path.suffix == ".safetensors"]
    denoisers, encoders = {"unet", "transformer"}, {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert {path.parent.name for path in files} == {*denoisers, *encoders, "vae", "judge", "second_judge"}
    for path in files:
        for name, value in load_file(path).items():
            counter = name.endswith("num_batches_tracked")
            assert value.dtype == (torch.int64 if counter else torch.float16), (path, name)
            assert torch.isfinite(value.float()).all(), (path, name)
