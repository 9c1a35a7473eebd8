"""The recipes in examples/: every one runs, a few steps on tiny models of the real classes."""

from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline

from diffusers_safe.distillation import run as distillation
from diffusers_safe.emoji.dataset import emoji_dataset
from diffusers_safe.formats import LORA_NAME
from diffusers_safe.training import esd, sdd


EXAMPLES = Path(__file__).parents[1] / "examples"
STUDENT = EXAMPLES / "emoji-student.yaml"
RECIPES = sorted(set(EXAMPLES.glob("*.yaml")) - {STUDENT})


def command_of(recipe):
    """The method that a recipe's own command line names."""
    (line,) = [line for line in recipe.read_text().splitlines() if "python train_" in line]
    assert line.endswith(f"--config examples/{recipe.name}")
    return {"train_sdd.py": sdd, "train_esd.py": esd}[line.split(" --config")[0].split()[-1]]


@pytest.fixture(scope="module")
def tiny_models(make_tiny_pipeline, make_tiny_xl_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_models")
    make_tiny_pipeline().save_pretrained(folder / "sd")
    make_tiny_xl_pipeline().save_pretrained(folder / "xl", variant="fp16")
    return folder


# One of each kind; the others are slow.
QUICK = ("emoji-weapon-sdd", "sd-1.4-artist-esd-x", "sd-1.4-nudity-sdd", "sdxl-artist-lora")


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=recipe.stem, marks=[] if recipe.stem in QUICK else pytest.mark.slow)
        for recipe in RECIPES
    ],
)
def test_a_recipe_runs(on_cpu, recipe, tiny_models, tmp_path):
    family = "xl" if recipe.name.startswith("sdxl") else "sd"
    quick = {
        "pretrained_model_name_or_path": tiny_models / family,
        "output_dir": tmp_path / "out",
        "resolution": 64,
        "max_train_steps": 2,
        "num_inference_steps": 2,
        "train_batch_size": 1,
        "sampling_fraction": 1.0,
        "latents_per_trajectory": 1,
    }
    words = [word for name, value in quick.items() for word in (f"--{name}", str(value))]
    # The tiny tokenizer, which is the embedded model's, spells out what it does not know, byte by byte.
    concepts = [] if recipe.name.startswith("emoji") else ["--concepts", "knife", "gun"]
    command_of(recipe).main(["--config", str(recipe), *words, *concepts])
    options = yaml.safe_load(recipe.read_text())
    if "rank" in options:
        assert (tmp_path / "out" / LORA_NAME).is_file()
    else:
        DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "validation" / "step-2.png").is_file() == ("validation_prompts" in options)


def test_the_recipe_of_a_student_runs(on_cpu, teacher_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    emoji_dataset(8, cache_dir=str(tmp_path / "cache")).to_parquet(data / "train.parquet")
    quick = {
        "pretrained_model_name_or_path": teacher_folder,
        "train_data_dir": data,
        "output_dir": tmp_path / "out",
        "max_train_steps": 2,
        "num_inference_steps": 2,
        "train_batch_size": 2,
        "lr_warmup_steps": 0,
    }
    words = [word for name, value in quick.items() for word in (f"--{name}", str(value))]
    distillation.main(["--config", str(STUDENT), *words])
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").unet.config.mid_block_type is None
    assert "train_distill.py --config examples/emoji-student.yaml" in STUDENT.read_text()
