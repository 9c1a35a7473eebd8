"""`train_sdd.py` as a user runs it: the command itself, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from closeness import ROUNDING, difference, trained
from diffusers_safe.erasure.loop import ErasureLoop
from diffusers_safe.formats import LORA_NAME, PARTIAL_NAME, load_partial
from diffusers_safe.output_folders import RECORD
from diffusers_safe.provenance import Provenance, fingerprint
from diffusers_safe.training.sdd import main
from diffusers_safe.weights.trained import select_parameters
from scripts import LAUNCH, ROOT, accelerate_on_cpu, environment, in_two_processes, log_rows, run, succeed, words_of


SCRIPT = str(ROOT / "train_sdd.py")
UNET = "unet/diffusion_pytorch_model.safetensors"
STEPS = 30  # few enough that each is a line of log.jsonl


def options(model, output_dir, **changes):
    chosen = {
        "pretrained_model_name_or_path": model,
        "concepts": ["knife", "gun"],
        "output_dir": output_dir,
        "num_inference_steps": 3,
        "max_train_steps": STEPS,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "watch_prompts": "a cat",
        "seed": 3,
        "save": "both",
        **changes,
    }
    return words_of(chosen)


@pytest.fixture(scope="module")
def erased(tiny_model_folder, tmp_path_factory):
    """The output folder of one whole run by `accelerate launch`."""
    folder = tmp_path_factory.mktemp("whole")
    succeed([*LAUNCH, SCRIPT, *options(tiny_model_folder, folder / "out")], folder)
    return folder / "out"


def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a knife", num_inference_steps=3, generator=generator, output_type="np").images


def test_the_result_is_a_stock_pipeline(erased, tiny_model_folder):
    index = json.loads((erased / "model_index.json").read_text())
    parts = [value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)]
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {library for library, _ in parts} <= {"diffusers", "transformers", None}
    image = picture(StableDiffusionPipeline.from_pretrained(erased))
    assert image.shape == (1, 64, 64, 3)
    assert difference(image, picture(StableDiffusionPipeline.from_pretrained(tiny_model_folder))) > 10 * ROUNDING
    assert {path.name for path in erased.iterdir() if path.is_file()} == {
        "model_index.json", "erasure.json", "log.jsonl", PARTIAL_NAME, RECORD
    }  # fmt: skip


def test_the_erased_weights_on_the_base_draw_the_same_picture(erased, tiny_model_folder):
    base = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    metadata = load_partial(base.unet, erased / PARTIAL_NAME)
    assert json.loads(metadata["concepts"]) == ["knife", "gun"]
    assert difference(picture(base), picture(StableDiffusionPipeline.from_pretrained(erased))) < ROUNDING


def test_only_the_selected_weights_left_the_base(erased, tiny_model_folder):
    before, after = load_file(Path(tiny_model_folder) / UNET), load_file(erased / UNET)
    selected = set(select_parameters(StableDiffusionPipeline.from_pretrained(tiny_model_folder).unet, "xattn"))
    assert trained(before, after, selected) == selected == set(load_file(erased / PARTIAL_NAME))
    for part in ("vae", "text_encoder"):
        (file,) = Path(tiny_model_folder, part).glob("*.safetensors")
        kept, own = load_file(erased / part / file.name), load_file(file)
        assert kept.keys() == own.keys() and all(torch.equal(kept[name], own[name]) for name in own)


def test_erasure_json_tells_what_was_done(erased, tiny_model_folder):
    record = Provenance.load(erased)
    assert record.base_model == tiny_model_folder
    base = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    assert record.base_fingerprint == fingerprint(base.unet)
    assert (record.concepts, record.method, record.train_method) == (["knife", "gun"], "sdd", "xattn")
    given = {"seed": 3, "learning_rate": 1e-3, "ema_decay": 0.5, "max_train_steps": STEPS, "train_batch_size": 2}
    assert given.items() <= record.arguments.items()
    assert record.versions["torch"] == torch.__version__


@pytest.mark.slow
def test_the_same_seed_without_accelerate_launch_writes_the_same_files(erased, tiny_model_folder, tmp_path):
    """The module is the command where only the package is installed."""
    command = [sys.executable, "-m", "diffusers_safe.training.sdd", *options(tiny_model_folder, tmp_path / "out")]
    succeed(command, tmp_path, ACCELERATE_USE_CPU="true")
    for name in (UNET, "log.jsonl", "unet/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (erased / name).read_bytes()
    ours, theirs = load_file(tmp_path / "out" / PARTIAL_NAME), load_file(erased / PARTIAL_NAME)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_resumed_run_ends_where_an_undisturbed_one_does(erased, tiny_model_folder, tmp_path):
    out = tmp_path / "out"
    command = [*LAUNCH, SCRIPT, *options(tiny_model_folder, out, checkpointing_steps=0)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not log_rows(out) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and the script
    output, _ = process.communicate(timeout=240)  # until the script, too, has closed its output
    assert process.returncode != 0
    assert "--resume_from_checkpoint" in output, output[-3000:]
    assert not (out / "model_index.json").exists() and not (out / "erasure.json").exists()
    (checkpoint,) = out.glob("checkpoint-*")
    stopped_at = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 1 <= stopped_at < STEPS

    resumed = options(tiny_model_folder, out, checkpointing_steps=0, resume_from_checkpoint="latest")
    succeed([sys.executable, SCRIPT, *resumed], tmp_path, ACCELERATE_USE_CPU="true")
    assert (out / UNET).read_bytes() == (erased / UNET).read_bytes()
    assert log_rows(out) == log_rows(erased)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_program_after_a_checkpoint(
    number, code, on_cpu, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    def step_and_be_stopped(loop, step):
        os.kill(os.getpid(), number)
        return {"erase": 0.0}

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(ErasureLoop, "train_step", step_and_be_stopped)
    with pytest.raises(SystemExit) as stop:
        main(options(tiny_model_folder, tmp_path / "out", checkpointing_steps=0))
    assert stop.value.code == code
    assert f"--resume_from_checkpoint {tmp_path / 'out' / 'checkpoint-1'}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-1", "log.jsonl", RECORD}
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(erased, tiny_model_folder, tmp_path):
    in_two_processes(SCRIPT, options(tiny_model_folder, tmp_path / "out", train_batch_size=1), tmp_path)
    two, one = log_rows(tmp_path / "out"), log_rows(erased)
    assert [row["step"] for row in two] == [row["step"] for row in one]  # logged once, not by each process
    assert two[0]["erase"] == pytest.approx(one[0]["erase"], rel=1e-4)  # before Adam makes steps of rounding

    base = load_file(Path(tiny_model_folder) / UNET)
    moved = [
        torch.cat([(weights[name] - base[name]).flatten() for name in sorted(base)])
        for weights in (load_file(erased / UNET), load_file(tmp_path / "out" / UNET))
    ]
    apart = (moved[0] - moved[1]).norm() / moved[0].norm()
    assert apart < 1e-3  # 8e-6 where it was measured; other draws would make it about 1


@pytest.mark.slow
def test_reused_trajectories_of_two_processes_go_on_in_one(tiny_model_folder, tmp_path):
    """Each process draws half of the pool, and the trajectories of its own slots; a checkpoint has all of them."""
    settings = {
        "latents_per_trajectory": 3,
        "trajectory_pool": 3,
        "retain_prompts": ["cat", "dog"],
        "max_train_steps": 6,
        "checkpointing_steps": 4,
    }
    out = tmp_path / "out"
    in_two_processes(SCRIPT, options(tiny_model_folder, out, train_batch_size=1, **settings), tmp_path)
    undisturbed = log_rows(out)
    state = torch.load(out / "checkpoint-4" / "custom_checkpoint_2.pkl", weights_only=True)
    assert sorted(number for number, *_ in state["drawn"]) == [2, 3]  # the second trajectory of each slot

    resumed = options(tiny_model_folder, out, resume_from_checkpoint="latest", **settings)
    succeed([sys.executable, SCRIPT, *resumed], tmp_path, ACCELERATE_USE_CPU="true")
    for after, before in zip(log_rows(out), undisturbed, strict=True):
        assert [after[term] for term in ("erase", "retain")] == pytest.approx(
            [before["erase"], before["retain"]], rel=1e-3
        )


# --- as a LoRA -------------------------------------------------------------------------------------------------------

LORA = {"rank": 4, "train_method": "esd-u", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def lora_erased(tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "out"
    with accelerate_on_cpu():
        main(options(tiny_model_folder, folder, **LORA))
    return folder


def test_a_lora_and_its_fused_pipeline_draw_the_same_picture(lora_erased, tiny_model_folder):
    stock = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    before = picture(stock)
    stock.load_lora_weights(lora_erased)
    fused = StableDiffusionPipeline.from_pretrained(lora_erased)
    assert np.allclose(picture(stock), picture(fused), atol=1e-4)
    assert not np.allclose(picture(stock), before, atol=1e-3)
    assert {path.name for path in lora_erased.iterdir() if path.is_file()} == {
        "model_index.json", "erasure.json", "log.jsonl", LORA_NAME, RECORD
    }  # fmt: skip
    arguments = Provenance.load(lora_erased).arguments
    assert (arguments["rank"], arguments["lora_alpha"], arguments["save"]) == (4, 4.0, "both")


def test_the_fused_pipeline_has_no_adapters_and_only_the_adapted_weights_left_the_base(lora_erased, tiny_model_folder):
    before, after = load_file(Path(tiny_model_folder) / UNET), load_file(lora_erased / UNET)
    assert before.keys() == after.keys()
    adapted = {name.removeprefix("unet.").split(".lora_")[0] for name in load_file(lora_erased / LORA_NAME)}
    adapted = {f"{name}.weight" for name in adapted}
    assert trained(before, after, adapted) == adapted


@pytest.mark.slow
def test_a_lora_is_what_is_saved_where_nothing_else_is_said_and_in_two_processes(
    lora_erased, tiny_model_folder, tmp_path
):
    changes = {**LORA, "train_batch_size": 1}
    words = options(tiny_model_folder, tmp_path / "out", **changes)
    del words[words.index("--save") : words.index("--save") + 2]
    in_two_processes(SCRIPT, words, tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"erasure.json", "log.jsonl", LORA_NAME, RECORD}
    one, two = load_file(lora_erased / LORA_NAME), load_file(tmp_path / "out" / LORA_NAME)
    assert one.keys() == two.keys()
    ups = [
        torch.cat([weights[name].flatten() for name in sorted(one) if ".lora_B." in name]) for weights in (one, two)
    ]
    assert (ups[0] - ups[1]).norm() < 1e-2 * ups[0].norm()  # Adam makes steps of rounding; other draws make it about 1


def test_a_bad_argument_is_one_clear_line_and_nothing_else(tiny_model_folder, tmp_path):
    done = run([*LAUNCH, SCRIPT, *options(tiny_model_folder, tmp_path / "out", train_method="half")], tmp_path)
    assert done.returncode != 0 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("train_sdd.py: error: train_method 'half'") and "xattn-strict" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_argument(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("pretrained_model_name_or_path", "concepts", "train_method", "max_train_steps", "output_dir", "seed"):
        assert f"--{name}" in text
