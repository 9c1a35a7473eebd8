"""`diffusers-safe export`: from every form to every form, with the base model found, and nothing half-written."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open

import diffusers_safe
from diffusers_safe import ErasedStableDiffusionPipeline, cli
from diffusers_safe.formats import (
    CHECKPOINT_NAME,
    KOHYA_NAME,
    LORA_NAME,
    PARTIAL_NAME,
    read_erased_weights,
    save_partial,
)
from diffusers_safe.output_folders import RECORD
from diffusers_safe.provenance import Provenance, fingerprint
from erasure_files import FORMS, make_erased, write_form


FULL_RANK = 16  # of the tiny model's layers that are changed here


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return DiffusionPipeline.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def partial(base, tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("partial")
    return write_form("partial", base.unet, make_erased(base.unet), folder, tiny_model_folder)


def export(source, to, folder, *options):
    cli.main(["export", str(source), "--to", to, "--output_dir", str(folder), *map(str, options)])
    return folder


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a knife", num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("to", ["full", "unet", "partial", "lora", "single-file"])
def test_each_form_holds_the_erasure_and_its_record(make_tiny_pipeline, partial, tmp_path, to, capsys):
    folder = export(partial, to, tmp_path / "out", *(("--rank", FULL_RANK, "--biases") if to == "lora" else ()))
    unet = make_tiny_pipeline().unet
    expected = {**dict(unet.named_parameters()), **make_erased(unet)}
    expected = {name: value.detach().clone() for name, value in expected.items()}
    read = read_erased_weights(folder)
    assert read.changes(unet).keys() == make_erased(unet).keys()
    read.apply(unet)
    assert all(torch.allclose(value, expected[name], atol=2e-6) for name, value in unet.named_parameters())
    record = Provenance.load(folder)
    assert (record.concepts, record.method, record.arguments) == (["knife"], "sdd", {"seed": 1})
    assert record.export["to"] == to and f"{to} in {folder}" in capsys.readouterr().out
    if to in ("lora", "single-file"):  # a file that was separated from its record knows it, too
        (file,) = folder.glob("*.safetensors")
        known = read_erased_weights(file).known
        assert known["concepts"] == ["knife"] and known["base_fingerprint"] == record.base_fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_everything_becomes_a_partial(base, tiny_model_folder, tmp_path, form):
    path = write_form(form, base.unet, make_erased(base.unet), tmp_path / "in", tiny_model_folder)
    known = form in ("partial", "esd-v2", "unet-in-folder")
    export(path, "partial", tmp_path / "out", *(() if known else ("--base_model", tiny_model_folder)))
    read = read_erased_weights(tmp_path / "out")
    assert read.known["base_model"] == tiny_model_folder
    assert read.known["base_fingerprint"] == fingerprint(base.unet)
    for name, value in make_erased(base.unet).items():
        assert torch.allclose(read.weights.pop(name), value, atol=2e-6)
    assert not read.weights


def test_a_lora_of_full_rank_draws_what_the_erased_model_draws(base, partial, tmp_path, capsys):
    erased = DiffusionPipeline.from_pretrained(export(partial, "full", tmp_path / "full"))
    lora = export(partial, "lora", tmp_path / "lora", "--rank", FULL_RANK, "--biases")
    stock = DiffusionPipeline.from_pretrained(base.config._name_or_path)
    before = draw(stock)
    stock.load_lora_weights(lora)
    assert np.abs(draw(stock) - draw(erased)).max() < 1e-4 < np.abs(before - draw(erased)).max()
    assert "error 0.00% of the change" in capsys.readouterr().out
    stock.load_lora_weights(lora / LORA_NAME, adapter_name="again")  # as a file, too


def test_a_lora_for_comfyui_is_the_same_lora_by_other_names(base, partial, make_tiny_pipeline, tmp_path, capsys):
    """Its biases are left out, so that it can be fused, and what is lost is printed and recorded."""
    folders = {to: export(partial, to, tmp_path / to, "--rank", 4) for to in ("lora", "kohya")}
    reports = [Provenance.load(folder).export for folder in folders.values()]
    assert {**reports[0], "to": "kohya"} == reports[1] and 0 < reports[1]["lost"] < reports[1]["error"]
    left_out = f"left out: 16 changed biases and norms ({reports[1]['lost']:.2%} of the change), such as "
    assert capsys.readouterr().out.count(left_out) == 2
    values = [read_erased_weights(folder).values(base.unet) for folder in folders.values()]
    assert values[0].keys() == values[1].keys() and not any("bias" in name for name in values[0])
    assert all(torch.allclose(values[0][name], values[1][name], atol=1e-6) for name in values[0])
    pictures = []
    for folder in folders.values():
        stock = make_tiny_pipeline()
        stock.load_lora_weights(folder)
        stock.fuse_lora()
        stock.unload_lora_weights()
        pictures.append(draw(stock))
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4
    assert {path.name for path in folders["kohya"].iterdir()} == {RECORD, "erasure.json", KOHYA_NAME}
    again = export(folders["kohya"], "lora", tmp_path / "again")
    assert Provenance.load(again).concepts == ["knife"]
    assert Provenance.load(again).export["rank"] == 4  # as the source has it


def test_a_checkpoint_is_read_by_diffusers_and_by_us(base, partial, make_tiny_pipeline, tmp_path):
    folder = export(partial, "single-file", tmp_path / "out")
    full = DiffusionPipeline.from_pretrained(export(partial, "full", tmp_path / "full"))
    make_tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")  # only its configs are used
    options = {"config": str(tmp_path / "other"), "safety_checker": None}
    read = StableDiffusionPipeline.from_single_file(folder / CHECKPOINT_NAME, **options)
    assert np.abs(draw(read) - draw(full)).max() < 1e-4
    ours = ErasedStableDiffusionPipeline.from_pretrained(folder)
    assert ours.erasure.base_model == base.config._name_or_path
    assert np.abs(draw(ours) - draw(full)).max() < 1e-4


def test_a_model_without_such_checkpoints_is_told_before_it_is_loaded(
    make_tiny_sd3_pipeline, tmp_path, capsys, monkeypatch
):
    pipeline = make_tiny_sd3_pipeline()
    pipeline.save_pretrained(tmp_path / "sd3")
    transformer, name = pipeline.transformer, "transformer_blocks.0.attn.add_k_proj.weight"
    provenance = Provenance(str(tmp_path / "sd3"), fingerprint(transformer), ["knife"], "sdd", "xattn", {})
    erased = {name: transformer.get_parameter(name).detach() + torch.randn(16, 16)}
    save_partial(erased, provenance, tmp_path / "x.safetensors")
    export(tmp_path / "x.safetensors", "kohya", tmp_path / "kohya", "--rank", 16)
    read = read_erased_weights(tmp_path / "kohya").values(transformer)
    assert read.keys() == {name} and torch.allclose(read[name], erased[name], atol=1e-5)
    capsys.readouterr()
    monkeypatch.setattr("diffusers_safe.formats.export.load_pipeline", None)
    with pytest.raises(SystemExit, match="2"):
        export(tmp_path / "x.safetensors", "single-file", tmp_path / "out")
    error = capsys.readouterr().err
    assert "is a StableDiffusion3Pipeline; allowed are StableDiffusionPipeline or StableDiffusionXLPipeline" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_error_falls_with_rank_and_is_written_down(partial, tmp_path, capsys):
    errors = []
    for rank in (1, 4, 16):
        export(partial, "lora", tmp_path / str(rank), "--rank", rank, "--biases")
        report = Provenance.load(tmp_path / str(rank)).export
        with safe_open(tmp_path / str(rank) / LORA_NAME, "pt") as file:
            assert json.loads(file.metadata()["export"]) == report
        assert report["rank"] <= rank and report["worst"]["error"] >= report["error"] * 0.9
        assert f"error {report['error']:.2%} of the change, at worst {report['worst']['error']:.2%}" in (
            capsys.readouterr().out
        )
        errors.append(report["error"])
    assert errors[0] > errors[1] > errors[2]


def test_what_a_lora_cannot_hold_is_told_or_left_out(base, tiny_model_folder, tmp_path, capsys):
    path = write_form("partial", base.unet, make_erased(base.unet, "noxattn"), tmp_path / "in", tiny_model_folder)
    with pytest.raises(SystemExit, match="2"):
        export(path, "lora", tmp_path / "out")
    error = capsys.readouterr().err
    assert re.search("error: a LoRA cannot hold .*norm.*of the change would be lost.*--only_weights", error)
    assert not (tmp_path / "out").exists()
    export(path, "lora", tmp_path / "out", "--only_weights", "--rank", FULL_RANK)
    told = capsys.readouterr().out
    assert re.search(r"left out: \d+ changed biases and norms \(\d+\.\d+% of the change\), such as", told)
    stock = DiffusionPipeline.from_pretrained(tiny_model_folder)
    stock.load_lora_weights(tmp_path / "out")
    stock.fuse_lora()
    stock.unload_lora_weights()
    name = "down_blocks.0.resnets.0.conv1.weight"
    erased = make_erased(base.unet, "noxattn")
    assert torch.allclose(stock.unet.get_parameter(name), erased[name], atol=1e-5)


def test_a_whole_pipeline_becomes_small_again(partial, tmp_path):
    full = export(partial, "full", tmp_path / "full")
    again = export(full, "partial", tmp_path / "partial")
    first, second = read_erased_weights(partial), read_erased_weights(again / PARTIAL_NAME)
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(value, second.weights[name]) for name, value in first.weights.items())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["{partial}", "--to", "gguf"],
            "to 'gguf': unknown; allowed are full, unet, transformer, partial, lora, kohya",
        ),
        (["{partial}", "--to", "full", "--rank", "4"], "rank 4: needs --to lora or kohya"),
        (["{partial}", "--to", "single-file", "--only_weights"], "only_weights: needs --to lora or kohya"),
        (["{partial}", "--to", "kohya", "--biases"], "biases: needs --to lora; ComfyUI and A1111 read no biases"),
        (["{partial}", "--to", "lora", "--biases", "--only_weights"], "cannot have only_weights and biases"),
        (["{partial}", "--to", "lora", "--rank", "0"], "rank 0: must be at least 1"),
        (["no/where", "--to", "full"], "'no/where': no such file, folder or Hub repository"),
        (["{partial}", "--to", "full", "--weight_name", "x.pt"], "no such file"),
        (["--to", "full"], "required: --source"),
    ],
)
def test_bad_input_is_one_line_before_any_work(partial, tmp_path, capsys, options, message):
    options = [option.format(partial=partial) for option in options]
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *options, "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_kept(partial, tmp_path, capsys):
    export(partial, "unet", tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    for source, message in (
        (partial, "holds results of another run"),
        (tmp_path / "out", "is the source's own folder; give another"),
    ):
        with pytest.raises(SystemExit):
            export(source, "full", tmp_path / "out")
        assert message in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces_a_result_when_the_new_one_is_there(base, partial, tmp_path):
    out = tmp_path / "out"
    export(partial, "full", out)
    (out / "unet" / "mine.txt").write_text("mine")
    before = {path.name for path in out.rglob("*")}
    with pytest.raises(SystemExit, match="2"):
        export(partial, "lora", out, "--rank", 17, "--overwrite")
    assert {path.name for path in out.rglob("*")} == before
    export(partial, "partial", out, "--overwrite")
    files = {path.name for path in out.rglob("*") if path.is_file()}
    assert files == {RECORD, "erasure.json", PARTIAL_NAME, "mine.txt"}
    for to, name in (("kohya", KOHYA_NAME), ("lora", LORA_NAME), ("single-file", CHECKPOINT_NAME)):
        export(partial, to, out, "--overwrite")
        files = {path.name for path in out.rglob("*") if path.is_file()}
        assert files == {RECORD, "erasure.json", name, "mine.txt"}
    export(out / CHECKPOINT_NAME, "unet", out, "--overwrite")  # from the file that makes way
    assert read_erased_weights(out).changes(base.unet).keys() == read_erased_weights(partial).weights.keys()


def test_a_relative_base_model_is_found_from_another_folder(base, partial, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(base.config._name_or_path).parent)
    name = Path(base.config._name_or_path).name
    for form in ("lora", "partial", "full"):
        export(partial, form, tmp_path / form, "--base_model", name)
    monkeypatch.chdir(tmp_path)
    for form, file in (("lora", LORA_NAME), ("partial", PARTIAL_NAME), ("full", "")):
        (tmp_path / form / "erasure.json").unlink() if file else None  # the file's metadata say it, too
        pipeline = ErasedStableDiffusionPipeline.from_pretrained(tmp_path / form / file)
        assert pipeline.erasure.base_model == base.config._name_or_path
        with pipeline.erasure_disabled():
            pass


def test_a_base_model_that_is_unknown_or_another_is_told_and_nothing_is_left(
    base, partial, make_tiny_pipeline, tmp_path, capsys
):
    folder = tmp_path / "runs" / "out"
    esd = write_form("esd", base.unet, make_erased(base.unet), tmp_path / "in")
    make_tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    gone = write_form("partial", base.unet, make_erased(base.unet), tmp_path / "gone", "a-model-of-then")
    for words, message in (
        ((esd, "full", folder), "does not say which model it was made from; give --base_model"),
        ((partial, "full", folder, "--base_model", tmp_path / "other"), "made for .* with fingerprint"),
        ((gone, "partial", folder), "base_model 'a-model-of-then': no .*the source names it, --base_model gives"),
    ):
        with pytest.raises(SystemExit) as stop:
            export(*words)
        assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert not folder.parent.exists()
    export(gone, "partial", folder, "--base_model", base.config._name_or_path)


def test_a_base_model_that_is_not_there_is_told_before_the_source_is_read(partial, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusers_safe.formats.export.read_erased_weights", None)
    with pytest.raises(SystemExit) as stop:
        export(partial, "full", tmp_path / "out", "--base_model", tmp_path / "nowhere")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: base_model '{tmp_path / 'nowhere'}': no folder" in error
    assert error.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, rank", [((), FULL_RANK), (("--rank", 1), 1)])
def test_a_rank_that_no_layer_has_is_told_and_the_default_is_none(base, partial, tmp_path, options, rank, capsys):
    with pytest.raises(SystemExit, match="2"):
        export(partial, "lora", tmp_path / "out", "--rank", 17)
    assert f"error: rank 17: must be from 1 to {FULL_RANK}, with which" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert Provenance.load(export(partial, "lora", tmp_path / "out", *options)).export["rank"] == rank


def test_an_output_folder_that_cannot_be_made_is_told(partial, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        export(partial, "partial", tmp_path / "file" / "out")
    assert stop.value.code == 2 and "cannot be written (Not a directory)" in capsys.readouterr().err


def test_in_python_wrong_names_and_empty_sources_are_one_line(tmp_path):
    for values, message in (
        ({"source": "x", "nosuch": 1}, "nosuch: no such option"),
        ({"source": ""}, "source: is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusers_safe.export(output_dir=str(tmp_path / "out"), **values)
