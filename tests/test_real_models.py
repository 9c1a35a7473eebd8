"""Commands for real models: each names its source and says that it was not run; papers' recipes are as published."""

import re

import pytest
import yaml

from diffusers_safe.erasure.job import parse_options
from scripts import ROOT


REAL = re.compile(r"CompVis/|stable-diffusion-v1-5/|stabilityai/|runwayml/|black-forest-labs/")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "examples").glob("sd*.yaml"))


def test_code_on_pages_names_its_source_and_that_it_was_not_run():
    blocks = [block for page in PAGES for block in re.findall(r"```.*?\n(.*?)```", page.read_text(), re.S)]
    real = [block for block in blocks if REAL.search(block)]
    assert len(real) >= 8
    for block in real:
        head = block[: REAL.search(block).start()]
        assert "Not run here." in head, head
        assert re.search(r"arXiv \d{4}\.\d{5}|github\.com|not the protocol of a paper", head), head


def test_programs_that_name_a_real_model_say_that_it_was_not_run():
    files = [*ROOT.glob("*.py"), *(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    texts = {file: re.findall(r'"""(.*?)"""', file.read_text(), re.S) for file in files}
    real = [(file, text) for file, found in texts.items() for text in found if REAL.search(text)]
    assert len(real) >= 10
    for file, text in real:
        assert re.search(r"not run\s+here", text, re.I), file


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_source_and_that_it_was_not_run(recipe):
    head = " ".join(line.lstrip("# ") for line in recipe.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"Source: .*(arXiv \d{4}\.\d{5}|github\.com/)", head) and "Not run here." in head


def command(text, script):
    """The first command of a script in a text, without the options that change no result."""
    (found, *_) = re.findall(rf"^(?:accelerate launch|python).*?{script} (.*?[^\\])\n(?!    )", text, re.S | re.M)
    return found.replace("\\\n", "").replace('"Van Gogh"', "Van_Gogh").replace('"', "").split()


def options(kind, words, tiny_model_folder, tmp_path):
    words = [word.replace("Van_Gogh", "Van Gogh") for word in words]
    place = words.index("--pretrained_model_name_or_path") + 1
    words[place] = tiny_model_folder
    words[words.index("--output_dir") + 1] = str(tmp_path / "out")
    return parse_options(kind, words)


@pytest.mark.parametrize("page", ["README.md", "docs/erasing.md"])
def test_sdd_on_a_page_is_the_papers_recipe(page, tiny_model_folder, tmp_path):
    words = command((ROOT / page).read_text(), "train_sdd.py")
    assert "CompVis/stable-diffusion-v1-4" in words
    args = options("sdd", words, tiny_model_folder, tmp_path)
    paper = {  # arXiv 2307.05977 and its repository
        "concepts": ["nudity"], "train_method": "xattn", "max_train_steps": 1500, "learning_rate": 1e-5,
        "lr_scheduler": "constant", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-4,
        "max_grad_norm": 1.0, "ema_decay": 0.999, "train_batch_size": 1, "gradient_accumulation_steps": 1,
        "num_inference_steps": 50, "sampling_guidance_scale": 3.0, "prompt_order": "paper", "sdd_target": "student",
        "target_prompt": "", "negative_guidance_scale": 0.0, "retain_prompts": [], "retain_unconditional": False,
        "sampling_fraction": 1.0, "latents_per_trajectory": 1, "loss_space": "prediction", "trajectory_pool": 0,
        "concept_schedule": "iterative", "mixed_precision": None, "rank": None,
    }  # fmt: skip
    assert {name: args.flat[name] for name in paper} == paper
    recipe = ["--config", str(ROOT / "examples" / "sd-1.4-nudity-sdd.yaml"), "--resolution", "64"]
    recipe += ["--pretrained_model_name_or_path", tiny_model_folder, "--output_dir", str(tmp_path)]
    args = parse_options("sdd", recipe)
    assert {name: args.flat[name] for name in paper} == paper


def test_esd_in_the_docs_is_the_authors_recipe(tiny_model_folder, tmp_path):
    words = command((ROOT / "docs" / "erasing.md").read_text(), "train_esd.py")
    args = options("esd", words, tiny_model_folder, tmp_path)
    authors = {  # esd_sd.py of github.com/rohitgandikota/erasing, 2025; its negative_guidance 2 is eta 1
        "concepts": ["Van Gogh"], "train_method": "xattn", "max_train_steps": 200, "learning_rate": 5e-5,
        "adam_weight_decay": 0.0, "max_grad_norm": 0.0, "negative_guidance_scale": 1.0, "sampling_model": "frozen",
        "num_inference_steps": 50, "sampling_guidance_scale": 3.0, "erase_from": None, "train_batch_size": 1,
    }  # fmt: skip
    assert {name: args.flat[name] for name in authors} == authors


@pytest.mark.parametrize("name", ["sd-1.4-nudity-esd-u", "sd-1.4-object-esd-u"])
def test_esd_u_of_the_paper_is_its_own_selection(name):
    recipe = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
    assert (recipe["preset"], recipe["train_method"]) == ("paper", "noxattn")
