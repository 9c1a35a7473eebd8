"""A stopped preparation continues to the same files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prepared_data import hashes, picture_folder, prepare, web_table
from scripts import environment


def test_the_same_command_continues_after_kill_9(server, tmp_path):
    names = [name for i in range(24) for name in (f"{i}.png", f"status-404?{i}")]
    table = web_table(tmp_path / "table.csv", server, names)
    options = ("--shard_size", "4", "--concurrency", "2")
    prepare(table, tmp_path / "whole", *options)
    server.delay = lambda name: 0.05
    server.requests.clear()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diffusers_safe.cli", "prepare-data", str(table), "--output_dir", str(out),
               "--allow_private_addresses"]  # fmt: skip
    env = environment(HF_DATASETS_CACHE=str(tmp_path / "cache"), NO_PROXY="127.0.0.1")
    process = subprocess.Popen([*command, *options], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "train-00001.tar").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "report.json").exists() and (out / ".preparation").is_dir()
    finished = {path: path.stat() for path in out.glob("*.tar")}
    server.delay = lambda name: 0
    server.requests.clear()
    prepare(table, out, *options)
    assert hashes(out) == hashes(tmp_path / "whole") and 2 <= len(finished) < 6
    for path, before in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    done = 4 * len(finished)  # pictures 0 to done - 1
    assert not {f"{i}.png" for i in range(done)} & set(server.requests) and len(server.requests) == 48 - 2 * done + 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_a_run_continues_after_a_stop_at_any_step(tmp_path, monkeypatch, form):
    folder = picture_folder(tmp_path / "pictures", 5)
    (folder / "01.png").write_bytes(b"no picture")
    (folder / "04.png").write_bytes(b"no picture")
    options = ("--format", form, "--shard_size", 2)
    report = prepare(folder, tmp_path / "whole", *options)
    assert (report["kept"], report["shards"], report["dropped"]) == (3, 2, {"not a picture": 2})
    replace, stops = os.replace, 0
    while True:
        out, left = tmp_path / f"out-{stops}", stops

        def replace_or_stop(source, target):
            nonlocal left
            if left == 0:
                raise Killed
            replace(source, target)
            left -= 1

        monkeypatch.setattr(os, "replace", replace_or_stop)
        try:
            prepare(folder, out, *options)
        except Killed:
            stops += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", replace)
        before = {path: path.stat().st_ino for path in out.glob("train-*")}
        assert prepare(folder, out, *options) == report
        assert hashes(out) == hashes(tmp_path / "whole")
        assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert stops == 10  # settings; two shards with records and entries in .written.json; report with two entries


def test_a_run_continues_after_a_stop_during_cleanup(tmp_path, monkeypatch):
    unlink = Path.unlink

    def stop(path, **options):
        if path.suffix == ".json":
            raise Killed
        unlink(path, **options)

    folder = picture_folder(tmp_path / "pictures", 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", stop)
        prepare(folder, tmp_path / "out")
    assert (tmp_path / "out" / ".preparation").is_dir()
    assert prepare(folder, tmp_path / "out")["kept"] == 1


def test_if_no_picture_is_left_the_error_lists_the_reasons(tmp_path):
    folder = picture_folder(tmp_path / "pictures", 2)
    with pytest.raises(SystemExit) as stop:
        prepare(folder, tmp_path / "out", "--forbidden_concepts", "picture")
    assert stop.value.code == "error: no image is left of 2 rows: forbidden concept 2"  # exit code 1
    assert not (tmp_path / "out").exists()
    assert prepare(folder, tmp_path / "out")["kept"] == 2
