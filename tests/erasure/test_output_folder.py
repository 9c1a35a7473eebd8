"""What trainings do with an output folder that holds something, through `erase` and its command line."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_safe import ErasedStableDiffusionPipeline, erase
from diffusers_safe.erasure.job import make_options
from diffusers_safe.formats import LORA_NAME, PARTIAL_NAME, load_denoiser, read_erased_weights
from diffusers_safe.output_folders import RECORD
from diffusers_safe.training import sdd
from scripts import ROOT, environment, log_rows


pytestmark = pytest.mark.usefixtures("on_cpu")
SDD = {
    "method": "sdd",
    "max_train_steps": 2,
    "num_inference_steps": 2,
    "watch_prompts": ["a cat"],
    "progress_bar": False,
}


def train(model, folder, **options):
    return erase(model, ["knife"], output_dir=str(folder), **{**SDD, **options})


def contents(folder):
    """path -> bytes of all files, links not followed."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder):
    """A finished run with a checkpoint. Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = tmp_path_factory.mktemp("runs") / "out"
        train(tiny_model_folder, folder, checkpointing_steps=1)
    return folder


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"save": "partial"}, {"rank": 2}, {"learning_rate": 1e-4}])
def test_a_copy_of_a_model_is_refused_and_stays_as_it_was(tiny_model_folder, tmp_path, options):
    folder = tmp_path / "X"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "unet" / "mine.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(ValueError, match="holds results of another run .*--overwrite"):
        train(tiny_model_folder, folder, **options)
    assert contents(folder) == before


@pytest.mark.parametrize("options", [{"save": "partial"}, {"rank": 2}])
def test_overwrite_replaces_what_was_written_and_keeps_the_rest(tiny_model_folder, out, options):
    (out / "unet" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="--overwrite"):
        train(tiny_model_folder, out, **options)
    train(tiny_model_folder, out, overwrite=True, **options)
    name = LORA_NAME if "rank" in options else PARTIAL_NAME
    assert contents(out).keys() == {RECORD, "erasure.json", "log.jsonl", name, "unet/mine.txt"}
    assert "overwrite" not in json.loads((out / "erasure.json").read_text())["arguments"]
    assert read_erased_weights(out).changes(load_denoiser(f"{tiny_model_folder}/unet"))


def test_an_overwriting_run_that_is_stopped_leaves_no_old_model_next_to_its_log(tiny_model_folder, out):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model_folder, out, overwrite=True, learning_rate=1e-4, callback=stop)
    assert {name for name in contents(out) if "/" not in name} == {RECORD, "log.jsonl"}
    with pytest.raises(ValueError, match=r"another run \(log.jsonl\)"):
        train(tiny_model_folder, out, learning_rate=1e-3)
    train(tiny_model_folder, out, learning_rate=1e-4)  # the same run, which had no checkpoint yet
    assert (out / "erasure.json").is_file() and not list(out.glob(".replaced-*"))


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "of an earlier version"])
def test_a_run_is_continued_in_its_own_folder(tiny_model_folder, out, record):
    if not record:
        (out / RECORD).unlink()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; give --resume_from_checkpoint latest"):
        train(tiny_model_folder, out)
    train(tiny_model_folder, out, resume_from_checkpoint="latest", max_train_steps=4, checkpointing_steps=1,
          checkpoints_total_limit=1)  # fmt: skip
    assert [row["step"] for row in log_rows(out)] == [1, 2, 3, 4]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((out / "erasure.json").read_text())["arguments"]["max_train_steps"] == 4
    assert bool(list(out.glob(".replaced-*"))) == (not record)


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_replaced(tiny_model_folder, out):
    before = contents(out)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match="the checkpoint is of another run: learning_rate 1e-05 there, 0.1 here"):
            train(tiny_model_folder, out, resume_from_checkpoint="latest", learning_rate=0.1, **options)
    assert contents(out) == before


@pytest.mark.parametrize(
    "log",
    [b'{"step": 1, "erase": 1.0}\n{"step": 2, "by_concept": {"caf\xc3', b"\xff\xfe\n[]\n{}\n", b"", b"\0" * 100, None],
)
def test_a_broken_log_never_stops_a_resume(tiny_model_folder, out, log):
    (out / "log.jsonl").write_bytes(log) if log is not None else (out / "log.jsonl").unlink()
    train(tiny_model_folder, out, resume_from_checkpoint="latest")
    assert [row["step"] for row in log_rows(out)] == ([1, 2] if log and b"1.0" in log else [2])


def test_files_of_a_person_in_a_checkpoint_are_kept(tiny_model_folder, out):
    (out / "checkpoint-1" / "mine.txt").write_text("mine")
    train(tiny_model_folder, out, resume_from_checkpoint="latest", max_train_steps=4, checkpointing_steps=1,
          checkpoints_total_limit=1)  # fmt: skip
    assert [path.name for path in (out / "checkpoint-1").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("save, rank", [("both", None), ("lora", 2), ("unet", None)])
def test_results_follow_the_umask(tiny_model_folder, tmp_path, save, rank):
    before = os.umask(0o027)
    try:
        train(tiny_model_folder, tmp_path / "out", save=save, rank=rank, checkpointing_steps=1)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"save": "partial"}])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_relative_base_model_is_found_from_everywhere(tiny_model_folder, tmp_path, monkeypatch, options, legacy):
    shutil.copytree(tiny_model_folder, tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    train("models/base", "runs/out", **options)
    record = tmp_path / "runs" / "out" / "erasure.json"
    assert json.loads(record.read_text())["base_model"] == str(tmp_path / "models" / "base")
    if legacy:
        record.write_text(json.dumps({**json.loads(record.read_text()), "base_model": "models/base"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(tmp_path / "runs" / "out")
    with pipeline.erasure_disabled():
        pass
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(ValueError, match="give base_model"):
        gone = ErasedStableDiffusionPipeline.from_pretrained(tmp_path / "runs" / "out")
        with gone.erasure_disabled():
            pass


@pytest.mark.parametrize(
    "folder, message",
    [
        ("", "output_dir '': is empty"),
        ("{model}", "is the base model's own folder"),
        ("{model}/unet", "is inside the base model's own folder"),
        ("{model}/model_index.json", "Not a directory"),
        ("caf\udce9", "not valid Unicode text"),
        ("n" * 300, "is too long"),
    ],
)
def test_paths_that_cannot_be_used_end_with_code_2_before_any_work(tiny_model_folder, capsys, folder, message):
    before = contents(tiny_model_folder)
    with pytest.raises(SystemExit) as stopped:
        sdd.main(["--pretrained_model_name_or_path", tiny_model_folder, "--concepts", "knife", "--output_dir",
                  folder.replace("{model}", tiny_model_folder)])  # fmt: skip
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert contents(tiny_model_folder) == before


@pytest.mark.slow
def test_of_two_runs_at_once_the_second_ends_at_once(tiny_model_folder, tmp_path):
    words = [str(ROOT / "train_sdd.py"), "--pretrained_model_name_or_path", tiny_model_folder, "--concepts", "knife",
             "--num_inference_steps", "2", "--output_dir", "out", "--max_train_steps"]  # fmt: skip
    options = {"stderr": subprocess.PIPE, "text": True, "env": environment(ACCELERATE_USE_CPU="true")}
    runs = [
        subprocess.Popen([sys.executable, *words, "12"], cwd=tmp_path, stdout=subprocess.DEVNULL, **options)
        for _ in range(2)
    ]
    told = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], told
    (lost,) = (text for run, text in zip(runs, told) if run.returncode == 2)
    assert "error: output_dir out: " in lost.strip().splitlines()[-1]
    assert len(log_rows(tmp_path / "out")) == 12


@pytest.mark.parametrize(
    "name", ["erasure.json", "log.jsonl", ".lock", "../x", "unet", "checkpoint-5", "validation", ""]
)
def test_trackers_get_a_folder_of_their_own(name, tiny_model_folder, tmp_path):
    options = {"concepts": "knife", "report_to": "tensorboard", "logging_dir": name}
    known = {"pretrained_model_name_or_path": tiny_model_folder, "output_dir": str(tmp_path / "out")}
    job = make_options("sdd", **known, **options)
    with pytest.raises(ValueError, match="logging_dir"):
        job.check_output()
