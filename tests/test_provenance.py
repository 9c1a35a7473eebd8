"""Records are written, read and checked; the models that they name are found."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from diffusers_safe.hub.contents import result_files
from diffusers_safe.provenance import (
    FILE_NAME,
    Distillation,
    Provenance,
    erasure_of,
    fingerprint,
    load_record,
    located,
    stored_path,
)


def test_round_trip_and_content(tmp_path):
    record = Provenance("CompVis/stable-diffusion-v1-4", "0" * 16, ["Van Gogh"], "sdd", "xattn", {"seed": 3}, "main")
    record.save(tmp_path)
    assert Provenance.load(tmp_path) == record
    content = json.loads((tmp_path / FILE_NAME).read_text())
    assert content["concepts"] == ["Van Gogh"] and content["versions"]["torch"] == torch.__version__


def test_missing_and_foreign_records(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Provenance.load(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"model": 1}')
    with pytest.raises(ValueError, match="not a valid record"):
        Provenance.load(tmp_path)


def test_the_fingerprint_depends_on_names_and_values():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert fingerprint(first) != fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(torch.nn.Sequential(first)) != fingerprint(first)


@pytest.mark.parametrize(
    ("model", "arguments", "found"),
    [
        ("models/base", {"output_dir": "runs/out"}, "models/base"),
        ("./models/base", {"output_dir": "./runs/out"}, "models/base"),
        ("../../models/base", {}, "models/base"),
        ("inside", {"output_dir": "/elsewhere"}, "runs/out/inside"),
        ("models/base", {"output_dir": "/runs/out"}, None),
        ("models/base", {"output_dir": "runs/another"}, None),
        ("models/base", {"output_dir": 3}, None),
        ("models/base", None, None),
        ("user/on-the-hub", {"output_dir": "runs/out"}, None),
        ("/gone/base", {"output_dir": "runs/out"}, None),
        ("", {}, None),
        (None, {}, None),
    ],
)
def test_relative_paths_are_resolved_from_the_folder_of_the_record(tmp_path, model, arguments, found):
    for folder in ("models/base", "runs/out/inside"):
        (tmp_path / folder).mkdir(parents=True)
    expected = model if found is None else tmp_path / found
    result = located(model, tmp_path / "runs" / "out", arguments)
    assert result == expected if found is None else Path(result).resolve() == expected


def test_records_and_files_name_folders_by_their_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    assert stored_path("base") == str(tmp_path / "base") and stored_path("user/base") == "user/base"
    Provenance("base", None, ["knife"], "sdd", "xattn", {"output_dir": "out"}).save("out")
    assert Provenance.load("out").base_model == str(tmp_path / "base")
    assert erasure_of("out")["base_model"] == str(tmp_path / "base")
    student = Distillation("base", "", "bk-tiny", {}, {}, {"output_dir": "out"})
    student.save("out")
    monkeypatch.chdir("/")
    assert load_record(tmp_path / "out").teacher == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds a JSON list"),
        ("null", "holds a JSON null"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "not JSON"),
        ('{"a": 1}', "not a valid record"),
        (json.dumps({**asdict(Provenance("b", None, ["a"], "sdd", "x", {})), "concepts": "a"}), "concepts is a str"),
        (json.dumps({**asdict(Provenance("b", None, ["a"], "sdd", "x", {})), "arguments": []}), "arguments is a list"),
        (json.dumps({**asdict(Provenance("b", None, [7], "sdd", "x", {}))}), "concepts has a int"),
        (json.dumps({**asdict(Provenance("", None, ["a"], "sdd", "x", {}))}), "base_model is empty"),
        (json.dumps({**asdict(Provenance(" ", None, ["a"], "sdd", "x", {}))}), "base_model is empty"),
        (json.dumps({**asdict(Provenance("b", None, ["a"], "sdd", "x", {}, None, {"a": []}))}), "versions has a list"),
    ],
)
def test_invalid_records_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "erasure.json").write_text(text)
    for read in (lambda: Provenance.load(tmp_path), lambda: erasure_of(str(tmp_path))):
        with pytest.raises(ValueError, match=f"erasure.json: .*{message}") as error:
            read()
        assert "\n" not in str(error.value)


def test_no_file_outside_a_result_is_published(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.json").write_text("{}")
    (tmp_path / "result" / "unet").mkdir(parents=True)
    (tmp_path / "result" / "unet" / "config.json").write_text("{}")
    Provenance("b", None, ["a"], "sdd", "x", {}).save(tmp_path / "result")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"], "../private": ["a", "b"]}
    (tmp_path / "result" / "model_index.json").write_text(json.dumps(index))
    assert result_files(tmp_path / "result") == ["erasure.json", "model_index.json", "unet/config.json"]
