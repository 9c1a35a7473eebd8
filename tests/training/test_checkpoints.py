import pytest
import torch
from accelerate import Accelerator

from diffusers_safe.erasure.run import run_command
from diffusers_safe.output_folders import RECORD
from diffusers_safe.training.checkpoints import list_checkpoints, save_checkpoint


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))
    yield accelerator
    accelerator.free_memory()


def test_newest_is_last_by_number_and_the_limit_keeps_the_newest(accelerator, tmp_path):
    for step in (2, 10, 9):
        save_checkpoint(accelerator, tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    save_checkpoint(accelerator, tmp_path, 11, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


def test_a_save_that_dies_leaves_no_checkpoint_and_does_not_disturb_the_next(accelerator, tmp_path, monkeypatch):
    def die(folder):
        (tmp_path / ".checkpoint-3.partial").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(accelerator, "save_state", die)
        save_checkpoint(accelerator, tmp_path, 3)
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(accelerator, tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "checkpoint-3"]


def test_files_and_other_names_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-last", "checkpoint-3.old", "my-checkpoint-1"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name, damage", [
    ("optimizer.bin", "cut"), ("custom_checkpoint_0.pkl", "flipped"), ("custom_checkpoint_3.pkl", "missing"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_reported_before_the_model_is_loaded(
    name, damage, tiny_model_folder, tmp_path, capsys
):
    words = f"--pretrained_model_name_or_path {tiny_model_folder} --concepts knife --num_inference_steps 3".split()
    words += f"--max_train_steps 2 --checkpointing_steps 1 --watch_prompts a --output_dir {tmp_path}".split()
    run_command("sdd", words)
    path = tmp_path / "checkpoint-1" / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:10] if damage == "cut" else content)
    with pytest.raises(SystemExit) as stop:
        run_command("sdd", [*words, "--resume_from_checkpoint", "latest"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and f"{name} is {'missing' if damage == 'missing' else 'damaged'}" in line
