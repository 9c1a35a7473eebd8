"""Damaged models: one line that names the model and the component, exit code 2, before any work."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file

from diffusers_safe import ErasedStableDiffusionPipeline
from diffusers_safe.commands import attack, evaluate, export, generate, students
from diffusers_safe.distillation import run as distillation
from diffusers_safe.erasure.run import erase, run_command
from diffusers_safe.families import check_files
from diffusers_safe.loading import load_model, load_pipeline
from diffusers_safe.model_errors import ModelError
from diffusers_safe.model_files import describe_weights


UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000


def write(path, content):
    return lambda model: (model / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path, **changes):
    def change(model):
        file = model / path
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tensors(path, change):
    def rewrite(model):
        state = {name: value.clone() for name, value in load_file(model / path).items()}
        change(state, sorted(state)[len(state) // 2])
        save_file(state, model / path, {"format": "pt"})

    return rewrite


def instead(path, make):
    """Something else where a file or folder was."""

    def change(model):
        place = model / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        make(place)

    return change


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def pickled(path, name):
    return instead(path, lambda place: torch.save({"weight": Evil()}, place.with_name(name)))


def sharded(left=None, index=None):
    def change(model):
        state = load_file(model / UNET)
        half, names = len(state) // 2, [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
        for part, name in zip(parts, names):
            save_file({key: value.clone() for key, value in part.items()}, model / "unet" / name, {"format": "pt"})
        weight_map = {key: name for part, name in zip(parts, names) for key in part}
        text = json.dumps({"metadata": {}, "weight_map": weight_map}) if index is None else index
        (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
        (model / UNET).unlink()
        if left is not None:
            (model / "unet" / names[left]).unlink()

    return change


def save_other_unet(model, **changes):
    config = json.loads((model / "unet" / "config.json").read_text())
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    UNet2DConditionModel(**{**known, **changes}).save_pretrained(model / "unet")


def symlink_loop(place):
    place.symlink_to(place.name)


BROKEN = {
    "index list": (write("model_index.json", '[["a", "b"]]'), "model_index.json: holds a JSON list; an object"),
    "index string": (write("model_index.json", '"x"'), "model_index.json: holds a JSON string"),
    "index number": (write("model_index.json", "3"), "model_index.json: holds a JSON number"),
    "index null": (write("model_index.json", "null"), "model_index.json: holds a JSON null"),
    "index deep": (write("model_index.json", DEEP), "nested too deeply"),
    "index utf-16": (write("model_index.json", "{}".encode("utf-16")), "no folder of a diffusers pipeline"),
    "index loop": (instead("model_index.json", symlink_loop), "no folder of a diffusers pipeline"),
    "index folder": (instead("model_index.json", Path.mkdir), "no folder of a diffusers pipeline"),
    "class number": (edit("model_index.json", _class_name=3), "_class_name 3: must be the name of a pipeline class"),
    "class model": (edit("model_index.json", _class_name="UNet2DConditionModel"), "is no pipeline of diffusers"),
    "entry string": (edit("model_index.json", unet="x"), r"unet 'x': must be \[library, class\]"),
    "entry short": (edit("model_index.json", unet=["diffusers"]), r"unet .*: must be \[library, class\]"),
    "entry numbers": (edit("model_index.json", unet=[1, 2]), r"unet .*: must be \[library, class\]"),
    "entry null": (edit("model_index.json", vae=[None, None]), "has no vae; StableDiffusionPipeline needs one"),
    "entry unknown": (
        edit("model_index.json", unet=["diffusers", "No"]),
        "unet: diffusers .* has no class No",
    ),
    "entry scheduler": (edit("model_index.json", scheduler=["diffusers", "UNet2DModel"]), "UNet2DModel is no schedul"),
    "unet config list": (write("unet/config.json", "[]"), "unet/config.json: holds a JSON list"),
    "vae config deep": (write("vae/config.json", DEEP), "vae/config.json: nested too deeply"),
    "text config latin": (write("text_encoder/config.json", b'"\xff"'), "text_encoder/config.json: not UTF-8 text"),
    "scheduler empty": (write("scheduler/scheduler_config.json", "{}"), "an object with entries is needed"),
    "scheduler value": (edit("scheduler/scheduler_config.json", num_train_timesteps="x"), "scheduler: TypeError"),
    "scheduler prediction": (
        edit("scheduler/scheduler_config.json", prediction_type="noise"),
        "scheduler: prediction_type 'noise': unknown; allowed are epsilon, v_prediction",
    ),
    "scheduler spacing": (
        edit("scheduler/scheduler_config.json", timestep_spacing="even"),
        "scheduler: timestep_spacing 'even': unknown; allowed are leading",
    ),
    "tokenizer deep": (write("tokenizer/tokenizer.json", DEEP), "tokenizer/tokenizer.json: nested too deeply"),
    "tokenizer length": (write("tokenizer/tokenizer_config.json", '{"a": 1}'), "tokenizer: .*model_max_length"),
    "tokenizer gone": (instead("tokenizer", lambda place: None), "tokenizer: no such folder"),
    "unet folder file": (instead("unet", Path.touch), "unet: no such folder"),
    "unet folder loop": (instead("unet", symlink_loop), "unet: no such folder"),
    "config gone": (instead("vae/config.json", lambda place: None), "vae/config.json: No such file"),
    "config loop": (instead("vae/config.json", symlink_loop), "vae/config.json: Too many levels of symbolic links"),
    "unet layers": (edit("unet/config.json", block_out_channels=[8, 16]), "unet/config.json: Must provide the same"),
    "unet groups": (edit("unet/config.json", norm_num_groups=0), "unet/config.json: ZeroDivisionError"),
    "unet size": (edit("unet/config.json", sample_size="big"), "sample_size 'big': must be a whole number above 0"),
    "text width": (
        lambda model: save_other_unet(model, cross_attention_dim=40),
        "unet cross_attention_dim 40: the text encoders give 32",
    ),
    "unet width": (
        edit("unet/config.json", in_channels=9),
        r"unet: conv_in.weight has shape \(8, 4, 3, 3\)",
    ),
    "unet missing": (tensors(UNET, lambda state, name: state.pop(name)), "unet: the weights lack up_blocks"),
    "unet extra": (
        tensors(UNET, lambda state, name: state.update(a=torch.ones(1))),
        "no place for a$",
    ),
    "unet shape": (
        tensors(UNET, lambda state, name: state.update({name: torch.ones(3)})),
        r"has shape \(3,\)",
    ),
    "vae integers": (
        tensors(VAE, lambda state, name: state.update({name: state[name].to(torch.int8)})),
        r"holds integers \(I8\); floating point is needed",
    ),
    "vae missing": (tensors(VAE, lambda state, name: state.pop(name)), "vae: the weights lack decoder"),
    "text empty": (write(TEXT, b""), "model.safetensors: is empty"),
    "text garbage": (write(TEXT, b"garbage " * 99), "model.safetensors: not a whole safetensors file"),
    "text gone": (instead(TEXT, lambda place: None), "text_encoder: no weights .* it holds config.json"),
    "text folder": (instead(TEXT, Path.mkdir), "model.safetensors: Is a directory"),
    "text loop": (instead(TEXT, symlink_loop), "model.safetensors: Too many levels of symbolic links"),
    "text pickle": (
        pickled(TEXT, "pytorch_model.bin"),
        r"refused, the pickle holds more than tensors \(it na",
    ),
    "unet pickle": (pickled(UNET, "diffusion_pytorch_model.bin"), r"refused, the pickle holds more than tensors"),
    "text bin": (
        instead(TEXT, lambda place: place.with_name("pytorch_model.bin").write_text("garbage")),
        "pytorch_model.bin: not a file of torch.save",
    ),
    "shard missing": (sharded(left=1), "the shard diffusion_pytorch_model-00002-of-00002.safetensors is missing"),
    "shards list": (sharded(index="[]"), "index.json: holds a JSON list"),
    "shards outside": (sharded(index='{"weight_map": {"a": "../../x"}}'), "the shard ../../x is missing"),
    "unet cut": (
        lambda model: (model / UNET).write_bytes((model / UNET).read_bytes()[:-100]),
        "not a whole safetensors file .*incomplete",
    ),
}
# What is seen when values are read.
LOADED = {
    "unet nan": (tensors(UNET, lambda state, name: state[name].fill_(torch.nan)), "unet: .* not finite numbers"),
    "text inf": (tensors(TEXT, lambda state, name: state[name].fill_(torch.inf)), "text_encoder: .* not finite num"),
    "text missing": (tensors(TEXT, lambda state, name: state.pop(name)), "text_encoder: .* missing_keys encoder"),
    "text shape": (tensors(TEXT, lambda state, name: state.update({name: torch.ones(3)})), "mismatched_keys"),
    "text hidden": (edit("text_encoder/config.json", num_attention_heads=7), "text_encoder: .* not a multiple"),
}


@pytest.fixture
def model(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700 and all(part in text for part in parts), text


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_damage_is_found_before_weights_are_read(model, change, message, monkeypatch):
    monkeypatch.chdir(model.parent)
    change(model)
    with pytest.raises(ModelError, match=message) as error:
        check_files(model, f"model '{model}'")
    one_line(error, str(model))
    assert not Path("pwned").exists()


@pytest.mark.parametrize("change, message", LOADED.values(), ids=LOADED)
def test_what_is_seen_in_values_is_found_while_loading(model, change, message):
    change(model)
    with pytest.raises(ModelError, match=message) as error:
        load_pipeline(model, f"model '{model}'")
    one_line(error, str(model))


def commands(model, good, out):
    """Each command that reads a model, on this one; `good` is another that is whole."""
    train = ["--concepts", "knife", "--max_train_steps", "1", "--num_inference_steps", "2", "--output_dir", out]
    few = ["--num_inference_steps", "1", "--output_dir", out]
    return {
        "train": lambda: run_command("sdd", ["--pretrained_model_name_or_path", model, *train]),
        "distill": lambda: distillation.main(
            ["--pretrained_model_name_or_path", model, "--student", "bk-base", "--train_data_dir", str(Path(good)),
             "--output_dir", out]
        ),
        "generate": lambda: generate.main(["--model", model, "--prompts", "a knife", *few]),
        "evaluate": lambda: evaluate.main(
            ["--models", f"a={good}", f"b={model}", "--prompts", "a knife", "--metrics", "pixel_distance", *few]
        ),
        "attack": lambda: attack.main(
            ["--model", model, "--emoji", "weapon", "--original", good, "--attacks", "seeds", *few]
        ),
        "students": lambda: students.main(
            ["--pretrained_model_name_or_path", model, "--student", "bk-base", "--output_dir", out]
        ),
        "export": lambda: export.main([f"{good}/unet", "--base_model", model, "--to", "full", "--output_dir", out]),
    }  # fmt: skip


NAMES = "train distill generate evaluate attack students export".split()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["index list", "unet missing", "text pickle"])
def test_each_command_ends_with_one_line(name, kind, model, tiny_model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BROKEN[kind][0](model)
    with pytest.raises(SystemExit) as stop:
        commands(str(model), tiny_model_folder, "out")[name]()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "error: " in error and str(model) in error
    assert not Path("out").exists() and not Path("pwned").exists()


@pytest.mark.parametrize("name", ["train", "generate", "students", "export"])
def test_values_that_are_not_finite_end_with_one_line_and_code_2(name, model, tiny_model_folder, tmp_path, capsys):
    LOADED["text inf"][0](model)
    with pytest.raises(SystemExit) as stop:
        commands(str(model), tiny_model_folder, str(tmp_path / "out"))[name]()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "text_encoder: " in error and "not finite numbers" in error


@pytest.mark.parametrize("kind", ["index list", "unet missing"])
def test_the_python_api_raises_one_line(kind, model, tiny_model_folder, tmp_path):
    BROKEN[kind][0](model)
    erased = tmp_path / "weights.safetensors"
    save_file(load_file(Path(tiny_model_folder) / UNET), erased)
    for call in (
        lambda: erase(str(model), ["knife"], "sdd", max_train_steps=1, output_dir=str(tmp_path / "out")),
        lambda: ErasedStableDiffusionPipeline.from_pretrained(erased, base_model=model),
        lambda: ErasedStableDiffusionPipeline.from_pretrained(model, base_model=tiny_model_folder),
    ):
        with pytest.raises(ModelError) as error:
            call()
        one_line(error, str(model))
    assert not (tmp_path / "out").exists()


# --- variants and single files ---------------------------------------------------------------------------------------


def rename(path, variant):
    return lambda model: (model / path).rename((model / path).with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
@pytest.mark.parametrize("paths", [[UNET, VAE, TEXT], [UNET], [TEXT]])
def test_the_only_variant_that_is_there_is_taken(model, variant, paths, caplog):
    for path in paths:
        rename(path, variant)(model)
    check_files(model, "model")
    pipeline = load_pipeline(model, "model")
    assert f"all weights are of the variant {variant}, which is loaded" in caplog.text
    again = load_pipeline(model, "model", variant=variant)
    assert torch.equal(pipeline.unet.conv_in.weight, again.unet.conv_in.weight)


def test_one_of_several_variants_must_be_named(model):
    shutil.copy(model / UNET, (model / UNET).with_suffix(".fp16.safetensors"))
    check_files(model, "model")  # the one without a variant is taken
    rename(UNET, "ema")(model)
    for variant in (None, "fp32"):
        with pytest.raises(ModelError, match="unet: no .*; give --variant ema or fp16$"):
            check_files(model, "model", variant)
    check_files(model, "model", "fp16")


def test_older_weights_of_torch_save_and_shards_are_read(model, tiny_pipeline, tmp_path):
    sharded()(model)
    check_files(model, "model")
    (model / TEXT).unlink()
    torch.save(tiny_pipeline.text_encoder.state_dict(), model / "text_encoder" / "pytorch_model.bin")
    state = tiny_pipeline.vae.state_dict()  # attention as it was named before 2023; SD 1.5's is
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value.contiguous() for key, value in state.items()}
    save_file(state, model / VAE, {"format": "pt"})
    check_files(model, "model")
    loaded = load_pipeline(model, "model")
    for name in ("unet", "vae", "text_encoder"):
        for mine, theirs in zip(getattr(loaded, name).parameters(), getattr(tiny_pipeline, name).parameters()):
            assert torch.equal(mine, theirs)


def test_a_single_file_says_how_to_convert_it(tmp_path, capsys):
    file = tmp_path / "realistic.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, file)
    message = f"P.from_single_file('{file}').save_pretrained('{tmp_path / 'realistic'}')"
    with pytest.raises(SystemExit) as stop:
        commands(str(file), "", "out")["generate"]()
    assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(ModelError, match="StableDiffusionPipeline as P"):
        erase(str(file), ["knife"])
    save_file({"model.diffusion_model.x": torch.zeros(1), "conditioner.embedders.1.x": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="StableDiffusionXLPipeline as P"):
        check_files(file, "model")
        load_pipeline(file, "model")
    torch.save({"state_dict": {"model.diffusion_model.x": torch.zeros(1)}}, tmp_path / "old.ckpt")
    with pytest.raises(ModelError, match="StableDiffusionPipeline as P"):
        load_pipeline(tmp_path / "old.ckpt", "model")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("name, match", [
    ("unet.x.lora_A.weight", "a LoRA, and no model; .*, and the LoRA as --lora"),
    ("down_blocks.0.x.weight", "weights of a denoiser, and no model; .*diffusers-safe export makes one"),
    ("x.weight", "weights of an unknown kind, and no model; "),
])  # fmt: skip
def test_a_single_file_that_is_no_model_says_what_it_is(tmp_path, suffix, name, match):
    file = tmp_path / f"file{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({name: torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=match):
        load_pipeline(file, "model")


def test_loading_shows_no_bars_of_the_libraries_and_leaves_their_switches_alone(tiny_model_folder, capfd):
    logs = (diffusers.utils.logging, transformers.utils.logging)
    bars = [log.is_progress_bar_enabled() for log in logs]
    hub = are_progress_bars_disabled()
    try:
        for log in logs:
            log.enable_progress_bar()
        enable_progress_bars()
        load_pipeline(tiny_model_folder, "model")
        assert capfd.readouterr().err == ""
        assert all(log.is_progress_bar_enabled() for log in logs) and not are_progress_bars_disabled()
    finally:
        for log, shown in zip(logs, bars):
            (log.enable_progress_bar if shown else log.disable_progress_bar)()
        (disable_progress_bars if hub else enable_progress_bars)()


@pytest.mark.parametrize("spaces", [0, 8, 24])
def test_weights_are_aligned_whatever_the_header_of_their_file(tiny_model_folder, spaces, tmp_path):
    shutil.copytree(Path(tiny_model_folder) / "unet", tmp_path / "unet")
    path = tmp_path / UNET
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header, values = path.read_bytes()[8 : 8 + length], path.read_bytes()[8 + length :]
    path.write_bytes(struct.pack("<Q", length + spaces) + header + b" " * spaces + values)
    unet = load_model(UNet2DConditionModel, tmp_path / "unet")
    assert {value.data_ptr() % 64 for value in unet.parameters()} == {0}
    stored = load_file(path)
    assert all(torch.equal(value, stored[name]) for name, value in unet.named_parameters())


def test_a_pipeline_is_the_stock_one(tiny_model_folder):
    loaded = load_pipeline(tiny_model_folder, "model", torch_dtype=torch.float16)
    stock = StableDiffusionPipeline.from_pretrained(tiny_model_folder, torch_dtype=torch.float16)
    assert type(loaded) is type(stock) and dict(loaded.config) == dict(stock.config)
    assert {name: type(part) for name, part in loaded.components.items()} == {
        name: type(part) for name, part in stock.components.items()
    }
    assert loaded.dtype == torch.float16 and not loaded.unet.training
    other = UNet2DConditionModel.from_config(stock.unet.config)
    assert load_pipeline(tiny_model_folder, "model", unet=other, safety_checker=None).unet is other


@pytest.mark.parametrize("names, what", [
    (["emb_params"], "a textual inversion embedding"),
    (["<knife>"], "a textual inversion embedding"),
    (["lora_unet_x.hada_w1_a"], "a LyCORIS file"),
    (["text_model.encoder.layers.0.mlp.fc1.weight"], "weights of a text encoder"),
    (["decoder.up_blocks.0.resnets.0.conv1.weight"], "weights of an autoencoder"),
    (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
    (["image_proj", "ip_adapter"], "an IP-Adapter"),
    (["a.b"], "weights of an unknown kind"),
])  # fmt: skip
def test_what_a_file_holds_is_seen_in_its_names(names, what):
    assert describe_weights(names).startswith(what)


# --- a full disk -----------------------------------------------------------------------------------------------------

WRITE_LITTLE = """
import resource, signal, sys
from diffusers_safe.erasure.run import run_command

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes in a file
run_command("sdd", sys.argv[1:])
"""


@pytest.mark.parametrize("checkpointing_steps", ["0", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_full_disk_is_one_line(checkpointing_steps, tiny_model_folder, tmp_path):
    """The result is written by safetensors, a checkpoint by torch.save."""
    words = ["--pretrained_model_name_or_path", tiny_model_folder, "--concepts", "knife", "--max_train_steps", "1",
             "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out"),
             "--checkpointing_steps", checkpointing_steps]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", WRITE_LITTLE, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out" / "unet").exists()
