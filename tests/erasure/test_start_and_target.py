"""Where a training begins, `--start_from`, and when it ends, `--target`."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffusers_safe import erase
from diffusers_safe.formats import PARTIAL_NAME
from diffusers_safe.training.sdd import main
from scripts import accelerate_on_cpu, log_rows, run_main


OPTIONS = {
    "concepts": ["knife"],
    "num_inference_steps": 4,
    "max_train_steps": 20,
    "learning_rate": 1e-2,
    "ema_decay": 0.5,
    "watch_prompts": ["a cat"],
}


def train(model, output_dir, **changes):
    run_main(main, pretrained_model_name_or_path=model, output_dir=output_dir, **{**OPTIONS, **changes})


@pytest.fixture(scope="module")
def edit(tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit") / "out"
    with accelerate_on_cpu():
        erasure = erase(str(tiny_model_folder), ["knife"], "uce", anchor_prompts=["tree"], watch_prompts=[])
    erasure.save(str(folder), "partial")
    return folder


# --- target ----------------------------------------------------------------------------------------------------------


def test_a_training_ends_once_the_target_is_reached(tiny_model_folder, tmp_path, capsys):
    train(tiny_model_folder, tmp_path / "whole", max_train_steps=40)
    left = {row["step"]: row["concept_left"] for row in log_rows(tmp_path / "whole")}
    target = sorted(left.values())[-2]
    first = next(step for step, value in left.items() if value <= target)
    capsys.readouterr()
    train(
        tiny_model_folder,
        tmp_path / "ended",
        max_train_steps=40,
        target=target,
        validation_prompts="a cat",
        validation_steps=1000,
    )
    assert [row["step"] for row in log_rows(tmp_path / "ended")] == [step for step in left if step <= first]
    assert f"{first}/{first}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ended" / "validation").iterdir()] == [f"step-{first}.png"]
    record = json.loads((tmp_path / "ended" / "erasure.json").read_text())
    assert record["arguments"]["target"] == target and record["arguments"]["trained_steps"] == first


def test_a_target_that_is_not_reached_is_reported(tiny_model_folder, tmp_path, caplog):
    train(tiny_model_folder, tmp_path / "out", max_train_steps=2, learning_rate=1e-9, target=0)
    assert log_rows(tmp_path / "out")[-1]["step"] == 2
    assert "target 0: not reached in 2 steps, 1 is left" in caplog.text


def test_with_a_target_a_run_does_not_grow(tiny_model_folder, tmp_path, capsys):
    train(tiny_model_folder, tmp_path, max_train_steps=3, target=0, learning_rate=1e-9, checkpointing_steps=2)
    with pytest.raises(SystemExit) as stopped:
        train(
            tiny_model_folder,
            tmp_path,
            max_train_steps=5,
            target=0,
            learning_rate=1e-9,
            resume_from_checkpoint="latest",
        )
    assert stopped.value.code == 2 and "max_train_steps" in capsys.readouterr().err


# --- start_from ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["partial", "full"])
def test_student_and_average_begin_with_the_edit_and_the_teacher_with_the_base_model(
    form, edit, tiny_model_folder, make_tiny_pipeline, tmp_path
):
    start = edit
    if form == "full":
        with accelerate_on_cpu():
            erase(str(tiny_model_folder), ["knife"], "uce", anchor_prompts=["tree"], watch_prompts=[]).save(
                str(tmp_path / "edit")
            )
        start = tmp_path / "edit"
    options = {**OPTIONS, "max_train_steps": 1, "learning_rate": 1e-12}
    erasure = erase(str(tiny_model_folder), method="sdd", start_from=str(start), **options)
    base = StableDiffusionPipeline.from_pretrained(tiny_model_folder).unet.state_dict()
    edited = load_file(edit / PARTIAL_NAME)
    for name, value in erasure.weights.items():
        torch.testing.assert_close(value.detach(), edited.get(name, base[name]))
    with erasure.disabled() as pipeline:
        assert all(torch.equal(value, base[name]) for name, value in pipeline.unet.state_dict().items())


def test_a_run_that_began_with_an_edit_continues(edit, tiny_model_folder, tmp_path):
    options = {"start_from": edit, "save": "partial", "checkpointing_steps": 2}
    train(tiny_model_folder, tmp_path / "whole", max_train_steps=4, **options)
    train(tiny_model_folder, tmp_path / "two", max_train_steps=2, **{**options, "checkpointing_steps": 1})
    train(tiny_model_folder, tmp_path / "two", max_train_steps=4, resume_from_checkpoint="latest", **options)
    whole, resumed = (load_file(tmp_path / name / PARTIAL_NAME) for name in ("whole", "two"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 4}, "start_from '.*': not with rank"),
        ({"train_method": "text-encoders"}, "not with train_method text-encoders"),
        ({"train_method": "selfattn"}, "start_from '.*': it changed .*attn2.* does not select"),
        ({"start_from": "nowhere"}, "start_from 'nowhere': no such file"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(edit, tiny_model_folder, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        train(tiny_model_folder, tmp_path / "out", **{"start_from": edit, **changes})
    assert stopped.value.code == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, printed), printed
    assert not (tmp_path / "out" / "erasure.json").exists()


@pytest.mark.parametrize("name", ["empty", "garbage.pt", "garbage.safetensors", "garbage"])
def test_a_start_that_cannot_be_read_is_refused_before_the_model_is_loaded(tiny_model_folder, tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    if name != "empty":
        (tmp_path / name).write_text("garbage")
    with pytest.raises(SystemExit) as stop:
        train(tiny_model_folder, tmp_path / "out", start_from=tmp_path / name, dry_run=True)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: start_from {tmp_path / name}" in error and error.count("\n") == 1


def test_the_edit_of_another_model_is_refused(edit, make_tiny_pipeline, tmp_path, capsys):
    make_tiny_pipeline(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "other", tmp_path / "out", start_from=edit)
    assert stopped.value.code == 2 and "start_from" in capsys.readouterr().err


def test_the_start_is_not_written_over(edit, tiny_model_folder, capsys):
    before = (edit / PARTIAL_NAME).read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train(tiny_model_folder, edit, start_from=edit, overwrite=True)
    assert stopped.value.code == 2 and "start_from" in capsys.readouterr().err
    assert (edit / PARTIAL_NAME).read_bytes() == before
