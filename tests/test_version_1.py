"""What version 0.1 wrote and read still works: results, records, checkpoints, YAML files, command lines.

`data/version-1` holds output folders of two trainings on the tiny model (without optimizer states), and the recipes.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_safe import ErasedStableDiffusionPipeline
from diffusers_safe.distillation.options import DistillationOptions
from diffusers_safe.erasure.job import erasure_options
from diffusers_safe.formats import read_erased_weights
from diffusers_safe.methods import find_method
from diffusers_safe.provenance import Provenance, fingerprint
from diffusers_safe.training.checkpoints import check_same_run
from diffusers_safe.yaml_files import read_yaml


DATA = Path(__file__).parent / "data" / "version-1"
RECIPES = sorted((DATA / "recipes").glob("*.yaml"))
COMMANDS = [
    ("sdd", "--pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --concepts nudity --output_dir safe"),
    ("esd", "--pretrained_model_name_or_path a --concepts 'Van Gogh' --train_method esd-x --output_dir b"),
    ("esd", "--pretrained_model_name_or_path a --concepts cat --erase_from animal --preset esd-2025 --output_dir b"),
    ("sdd", "--pretrained-model-name-or-path a --concepts cat --target_prompt fruit --sdd_target frozen --rank 4 "
            "--lora_alpha 2 --save both --loss_space velocity --output_dir b --save unet"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """The folder of the tiny model and its fingerprint: random weights are not the same on every CPU."""
    folder = tmp_path_factory.mktemp("base")
    pipeline = build_tiny_pipeline(layers_per_block=1)
    pipeline.save_pretrained(folder)
    return str(folder), fingerprint(pipeline.unet)


@pytest.fixture
def result(base_model, tmp_path):
    """The function `(name) -> Path` that copies a result and makes it one of the tiny model as it is here."""

    def copy(name):
        folder, (base, own) = Path(shutil.copytree(DATA / name, tmp_path / name)), base_model
        record = json.loads((folder / "erasure.json").read_text())
        written = record["base_fingerprint"]
        (folder / "erasure.json").write_text(json.dumps({**record, "base_model": base, "base_fingerprint": own}))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                metadata = {key: value.replace(written, own) for key, value in file.metadata().items()}
            save_file(load_file(path), path, metadata)
        return folder

    return copy


def test_erased_weights_load(result):
    folder = result("sdd")
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(folder)
    assert pipeline.erasure.concepts == ["knife", "gun"] and pipeline.erasure.method == "sdd"
    stored = load_file(folder / "erased_weights.safetensors")
    weights = pipeline.unet.state_dict()
    assert stored and all((weights[name] == value).all() for name, value in stored.items())


def test_a_lora_loads(result):
    folder = result("esd")
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(folder)
    assert fingerprint(pipeline.unet) != pipeline.erasure.base_fingerprint
    with pipeline.erasure_disabled():
        changed = read_erased_weights(folder).changes(pipeline.unet)
    weights = pipeline.unet.state_dict()
    assert changed and all(torch.allclose(weights[name], value, atol=1e-6) for name, value in changed.items())


@pytest.mark.parametrize("name, method", [("sdd", "sdd"), ("esd", "esd")])
def test_a_checkpoint_is_of_the_same_run(name, method):
    arguments = Provenance.load(DATA / name).arguments
    for launched in ("num_processes", "mixed_precision"):
        arguments.pop(launched)
    options = erasure_options(find_method(method)).of(**arguments)
    check_same_run(DATA / name / "checkpoint-2", options.identity)
    other = options.with_values(seed=1)
    with pytest.raises(ValueError, match="of another run: seed 0 there, 1 here"):
        check_same_run(DATA / name / "checkpoint-2", other.identity)
    added_since = {"start_from": None, "target": None}
    assert options.recorded == {**arguments, **added_since, "mixed_precision": None}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read(path):
    values = read_yaml(path, "config")
    script = next(name for name in ("sdd", "esd", "distill") if f"train_{name}.py" in path.read_text())
    kind = DistillationOptions if script == "distill" else erasure_options(find_method(script))
    options = kind.of(**values)
    assert options.flat["output_dir"] == values["output_dir"]
    assert str(options.run.max_train_steps) == values.get("max_train_steps", str(options.run.max_train_steps))


@pytest.mark.parametrize("method, words", COMMANDS)
def test_a_command_line_is_read(method, words, monkeypatch):
    from diffusers_safe.erasure import job

    kind = erasure_options(find_method(method))
    monkeypatch.setattr(kind, "check_surroundings", lambda self: None)
    assert job.parse_options(method, shlex.split(words)).method.name == method


def test_an_option_that_was_removed_may_have_its_old_default(tmp_path):
    values = {"pretrained_model_name_or_path": "a", "output_dir": "b", "student": "bk-small", "dataset_name": "c"}
    options = DistillationOptions.of(**values, noise_offset="0", timestep_bias_end=1000)
    assert "noise_offset" not in options.flat
    with pytest.raises(ValueError, match="^noise_offset 0.1: was removed; allowed is 0.0, or to leave it out$"):
        DistillationOptions.of(**values, noise_offset=0.1)
