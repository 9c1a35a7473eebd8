"""The names of embedded models work wherever a model is expected, and records keep them."""

import json

import pytest
from diffusers import StableDiffusionPipeline

from diffusers_safe import cli
from diffusers_safe.embedded import EMBEDDED_MODELS, check_revision, embedded_name, locate_model
from diffusers_safe.families import StoredModel, check_files
from diffusers_safe.formats.source import fetch
from diffusers_safe.hub.base import find_base
from diffusers_safe.loading import load_pipeline
from diffusers_safe.model_files import read_index
from diffusers_safe.provenance import erasure_of, located, stored_path


@pytest.fixture(params=EMBEDDED_MODELS)
def name(request):
    return request.param


def test_every_embedded_model_is_a_pipeline_with_its_licence(name):
    index = read_index(name, "model")
    assert index == json.loads((EMBEDDED_MODELS[name] / "model_index.json").read_text())
    check_files(name, "model")
    base = find_base(name)
    assert (base.name, base.on_hub, base.metadata["license"]) == (name, False, "apache-2.0")


def test_a_name_means_the_embedded_model_unless_a_folder_has_that_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = EMBEDDED_MODELS[name]
    assert locate_model(name) == str(fetch(name)) == str(folder) and locate_model("user/name") == "user/name"
    assert embedded_name(folder) == name and embedded_name(tmp_path) is None
    (tmp_path / name).mkdir()
    assert locate_model(name) == name


def test_records_keep_the_name(name, tmp_path):
    assert stored_path(name) == stored_path(str(EMBEDDED_MODELS[name])) == located(name, tmp_path) == name
    assert stored_path(str(tmp_path)) == str(tmp_path)
    assert erasure_of(name) is None


def test_the_diffusion_model_loads_by_name():
    pipeline = load_pipeline("emoji", "model")
    assert type(pipeline) is StableDiffusionPipeline and pipeline.config._name_or_path == "emoji"
    model = StoredModel("emoji")
    assert model.latent_shape[1:] == (16, 16) and len(model.tokenizers) == 1


def test_a_revision_of_a_local_model_is_refused(name, tmp_path, capsys):
    output = ["--output_dir", str(tmp_path / "out")]
    for model in (name, str(EMBEDDED_MODELS[name])):
        for words in (
            ["erase", "--pretrained_model_name_or_path", model, "--concepts", "knife", "--revision", "x", *output],
            ["generate", "--model", model, "--prompts", "a knife", "--revision", "x", *output],
            ["students", "--pretrained_model_name_or_path", model, "--revision", "x"],
            ["export", model, "--to", "full", "--revision", "x", *output],
            ["export", "runs/x", "--to", "full", "--base_model", model, "--base_revision", "x", *output],
        ):
            with pytest.raises(SystemExit, match="2"):
                cli.main(words)
            assert f"revision x: {model} is on this computer and has no revisions" in capsys.readouterr().err
    check_revision("x", "user/name")
    check_revision(None, name)
