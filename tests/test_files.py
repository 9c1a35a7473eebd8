"""Files are complete or missing, have the permissions of the umask, and incomplete lines are ignored."""

import json
import os
import resource
import stat
import subprocess
import sys

import pytest
import torch

from diffusers_safe.files import disk_errors, follow_umask, json_lines, save_tensors, write_text


@pytest.fixture
def umask():
    """Sets the umask and restores it."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "below" / "file").write_text("")
    (tmp_path / "folder" / "below" / "file").chmod(0o600)
    follow_umask(tmp_path / "folder")
    for path in (tmp_path / "a.safetensors", tmp_path / "folder" / "below" / "file"):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "folder"]


TEXT = json.dumps({"a": "Käse 猫"}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("cut", range(1, len(TEXT.encode())))
def test_an_incomplete_last_line_is_ignored(tmp_path, cut):
    path = tmp_path / "x.jsonl"
    path.write_bytes(TEXT.encode() + TEXT.encode()[:-cut])
    assert json_lines(path) == [(TEXT.strip(), {"a": "Käse 猫"})]


@pytest.mark.parametrize("broken", [b"\xff\xfe\n", b"\0\0\0\n", b"{\n", b"\n", b"[" * 100_000 + b"\n"])
def test_invalid_lines_do_not_hide_others(tmp_path, broken):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + broken + b'{"a": "\xe2\x80\xa8"}\n\0\0')  # a line separator is not a line break
    assert [value for _, value in json_lines(path)] == [{"a": 1}, None, {"a": "\u2028"}]


def test_a_failed_write_keeps_the_previous_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.zeros(2)}, path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        with pytest.raises(OSError, match="a.safetensors: cannot be written"):
            save_tensors({"a": torch.zeros(10_000)}, path)
        with pytest.raises(OSError):
            write_text(tmp_path / "b.json", "x" * 20_000)
        with pytest.raises(OSError, match="c.bin: cannot be written"), disk_errors(tmp_path / "c.bin"):
            torch.save(torch.zeros(10_000), tmp_path / "c.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["a.safetensors", "c.bin"]


def test_other_errors_are_not_converted():
    with pytest.raises(RuntimeError, match="no disk"), disk_errors("x"):
        raise RuntimeError("no disk is involved")


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    """/dev/full behaves like a full disk."""
    code = (
        "import torch, pathlib; from diffusers_safe.messages import exit_with_error\n"
        "from diffusers_safe.files import disk_errors\n"
        "with exit_with_error(), disk_errors('/dev/full'):\n    torch.save(torch.zeros(9), '/dev/full')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "/dev/full: cannot be written" in done.stderr
