"""`diffusers-safe erase`: methods, recipes, configs, and what it refuses."""

import os
import shutil
from pathlib import Path

import pytest

from diffusers_safe import cli, distill
from diffusers_safe.erasure.recipes import find_recipe, recipes


pytestmark = pytest.mark.usefixtures("on_cpu")


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["erase", *map(str, words)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return line


def model(folder, out):
    return ["--pretrained_model_name_or_path", folder, "--concepts", "knife", "--output_dir", out]


@pytest.mark.parametrize("name", ["emoji-cat-sdd", "emoji-cat", "Emoji_Cat"])
def test_a_recipe_has_a_name(name, tmp_path, capsys):
    cli.main(["erase", "--recipe", name, "--dry_run", "--output_dir", str(tmp_path / "out")])
    assert "cat by SDD" in capsys.readouterr().out


def test_the_recipes_of_the_papers_have_short_names():
    assert find_recipe("sd-nudity-sdd") == recipes()["sd-1.4-nudity-sdd"]
    with pytest.raises(ValueError, match="recipe emoji-cats .did you mean emoji-cat-.*: unknown; there are emoji-cat"):
        find_recipe("emoji-cats")


@pytest.mark.parametrize("method", ["ESD", "esd", ""])
def test_a_config_names_the_method(method, tiny_model_folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"method: {method}\nconcepts: [knife]\n")
    words = [*model(tiny_model_folder, tmp_path / "out"), "--config", tmp_path / "run.yaml", "--dry_run"]
    cli.main(["erase", *map(str, words)])
    assert f"knife by {'ESD' if method else 'text edit'}" in capsys.readouterr().out
    if method:
        other = ["--method", "concept_ablation", "--anchor_prompt", "a"]
        assert f"method is {method}, here it must be concept_ablation" in refused(capsys, *other, *words)


def test_bad_values_are_one_line(tiny_model_folder, tmp_path, capsys):
    words = model(tiny_model_folder, tmp_path / "out")
    assert "method '': unknown" in refused(capsys, "--method", "", *words)
    assert "learning_rate 1e+38: must be at most 1,000" in refused(
        capsys, "--method", "sdd", "--learning_rate", "1e38", *words
    )
    assert "anchor_prompt: is blank" in refused(
        capsys, "--method", "concept_ablation", "--anchor_prompt", "\u200b", *words
    )
    assert "--anchor_prompt" in refused(capsys, "--method", "concept_ablation", *words)
    assert "give either --recipe or --config" in refused(capsys, "--recipe", "emoji-cat", "--config", "x.yaml")
    same = ["--method", "esd", "--erase_from", "cat", "--retain_prompts", "Cat", *words]
    assert "retain_prompts 'cat': is what the concepts are erased from" in refused(capsys, *same)
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_the_place_of_weights_is_one_line(tiny_model_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.unlink()
    os.mkfifo(weights)
    assert "is not a regular file" in refused(capsys, *model(folder, tmp_path / "out"))


def test_a_missing_evaluation_is_an_error_of_the_call(tiny_model_folder, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="evaluation .*nosuch.yaml: .*cannot be read"):
        distill(tiny_model_folder, str(tmp_path / "out"), student="bk-small", train_data_dir=str(tmp_path / "data"),
                evaluation=str(tmp_path / "nosuch.yaml"))  # fmt: skip
