"""`train_esd.py` as a user runs it; what it shares with `train_sdd.py` is tested there."""

import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from closeness import trained
from diffusers_safe.provenance import Provenance
from diffusers_safe.training.esd import main
from diffusers_safe.weights.trained import select_parameters
from scripts import ROOT, in_two_processes, log_rows, succeed, words_of


SCRIPT = str(ROOT / "train_esd.py")
UNET = "unet/diffusion_pytorch_model.safetensors"


def options(model, output_dir, **changes):
    return words_of(
        {
            "pretrained_model_name_or_path": model,
            "concepts": ["knife", "gun"],
            "output_dir": output_dir,
            "num_inference_steps": 3,
            "max_train_steps": 6,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "watch_prompts": "a cat",
            **changes,
        }
    )


def test_a_config_file_a_preset_and_the_command_line_make_an_erased_stock_pipeline(
    on_cpu, tiny_model_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("preset: esd-2025\ntrain_method: esd-u\nerase_from: a tool\nseed: 4\n")
    main(options(tiny_model_folder, "out", config="run.yaml", seed=5))
    out = tmp_path / "out"
    record = Provenance.load(out)
    given = {"seed": 5, "erase_from": "a tool", "sampling_model": "frozen", "negative_guidance_scale": 2.0}
    assert record.method == "esd" and given.items() <= record.arguments.items()
    base = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    before, after = base.unet.state_dict(), StableDiffusionPipeline.from_pretrained(out).unet.state_dict()
    selected = set(select_parameters(base.unet, "esd-u"))
    assert trained(before, after, selected) == selected
    assert log_rows(out)[0]["by_concept"].keys() == {"knife", "gun"}


def test_a_dry_run_tells_the_plan_and_writes_nothing(tiny_model_folder, tmp_path, capsys):
    main([*options(tiny_model_folder, tmp_path / "out"), "--dry_run"])
    told = capsys.readouterr().out
    for word in ("knife, gun by ESD", "cross-attention", "forward passes", "memory", "nothing was trained or written"):
        assert word in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_resume_what_one_began(tiny_model_folder, tmp_path):
    """And see the same samples: latents of the student, several concepts, retention."""
    changes = {"retain_prompts": "dog", "retain_unconditional": True}
    succeed([sys.executable, SCRIPT, *options(tiny_model_folder, "whole", checkpointing_steps=3, **changes)],
            tmp_path, ACCELERATE_USE_CPU="true")  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "out" / "checkpoint-3")
    # Another tracker is no other run; its end must not be the end of the processes' group.
    changes |= {"train_batch_size": 1, "resume_from_checkpoint": "latest", "report_to": "tensorboard"}
    in_two_processes(SCRIPT, options(tiny_model_folder, "out", **changes), tmp_path)
    base = load_file(f"{tiny_model_folder}/{UNET}")
    moved = [
        torch.cat([(weights[name] - base[name]).flatten() for name in sorted(base)])
        for weights in (load_file(tmp_path / folder / UNET) for folder in ("whole", "out"))
    ]
    assert (moved[0] - moved[1]).norm() < 1e-3 * moved[0].norm()


@pytest.mark.parametrize(
    "surroundings, changes, message",
    [
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "false"}, {}, "2 processes were launched, but each would train"),
        ({"ACCELERATE_USE_CPU": "true"}, {"mixed_precision": "fp16"}, "mixed_precision fp16: gradients need a GPU"),
    ],
)
def test_what_the_device_cannot_do_is_one_line_before_anything_is_loaded(
    on_cpu, tiny_model_folder, tmp_path, monkeypatch, capsys, surroundings, changes, message
):
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main(options(tiny_model_folder, tmp_path / "out", **changes))
    assert stop.value.code == 2 and f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
