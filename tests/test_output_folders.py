"""Output folders: one run at a time, and nothing is lost that this program did not write."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_safe.files import write_text
from diffusers_safe.output_folders import (
    LOCK,
    RECORD,
    OutputFolderError,
    _Written,
    check_apart,
    check_claim,
    check_output_dir,
    check_own_file,
    claimed,
    make_way,
    put_in_place,
    record_written,
    remove_leftover,
    states_of,
    write_own,
)


RESULTS = ("erasure.json", "model_index.json", "unet", "weights.safetensors")


def tree(folder):
    """path -> text of all files, without the record."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != RECORD]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def fill(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def put(folder, files, overwrite=False, at_once=False):
    """What a run does that writes these files."""
    with claimed(folder, "test", {"files": 1}, replaces=RESULTS, overwrite=overwrite, at_once=at_once):
        for name, text in files.items():
            path = folder / ".aside" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        put_in_place(folder / ".aside", folder, RESULTS)


FULL = {"model_index.json": "{}", "unet/config.json": "config", "unet/model.safetensors": "weights"}
PART = {"weights.safetensors": "part", "erasure.json": "{}"}


# --- whose it is -----------------------------------------------------------------------------------------------------


def test_a_result_of_another_run_is_refused_and_named(tmp_path):
    put(tmp_path, FULL)
    for at_once in (False, True):
        with pytest.raises(OutputFolderError, match=r"holds results of another run \(model_index.json\).*--overwrite"):
            put(tmp_path, PART, at_once=at_once)
        with pytest.raises(OutputFolderError, match="--overwrite"):
            check_claim(tmp_path, replaces=RESULTS, at_once=at_once)
    assert tree(tmp_path) == FULL


@pytest.mark.parametrize("at_once", [False, True])
def test_overwrite_deletes_what_was_written_and_nothing_else(tmp_path, at_once):
    put(tmp_path, FULL)
    fill(tmp_path, unet__notes="mine", notes="mine", other__config="mine")
    put(tmp_path, PART, overwrite=True, at_once=at_once)
    assert tree(tmp_path) == {**PART, "unet/notes": "mine", "notes": "mine", "other/config": "mine"}
    put(tmp_path, FULL, overwrite=True, at_once=at_once)
    assert tree(tmp_path) == {**FULL, "unet/notes": "mine", "notes": "mine", "other/config": "mine"}


def test_what_was_not_written_is_moved_where_a_loader_would_take_it_for_the_result(tmp_path, caplog):
    """`cp -r MODEL X`, with another variant and a note in its folder."""
    files = {**FULL, "unet/model.fp16.safetensors": "halves", "unet/notes.txt": "mine", "notes.txt": "mine"}
    fill(tmp_path, **{name.replace("/", "__"): text for name, text in files.items()})
    with caplog.at_level(logging.WARNING):
        put(tmp_path, PART, overwrite=True)
    kept = {f".replaced-1/{name}": text for name, text in files.items() if not name.endswith("notes.txt")}
    assert tree(tmp_path) == {**PART, **kept, "unet/notes.txt": "mine", "notes.txt": "mine"}
    assert "did not write were moved to" in caplog.text
    (tmp_path / "model_index.json").write_text("another")
    put(tmp_path, PART, overwrite=True)
    assert (tmp_path / ".replaced-2" / "model_index.json").read_text() == "another"


def test_a_file_that_was_changed_is_not_ours_any_more(tmp_path):
    put(tmp_path, FULL)
    (tmp_path / "unet" / "config.json").write_text("changed by hand")
    put(tmp_path, PART, overwrite=True)
    assert (tmp_path / ".replaced-1" / "unet" / "config.json").read_text() == "changed by hand"


def test_links_are_neither_followed_nor_lost(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    fill(base, **{"config.json": "base", "model.safetensors": "base"})
    put(out, FULL)
    for path in (out / "unet").iterdir():
        path.unlink()
    (out / "unet").rmdir()
    (out / "unet").symlink_to(base, target_is_directory=True)
    put(out, FULL, overwrite=True)
    assert tree(base) == {"config.json": "base", "model.safetensors": "base"}
    assert not (out / "unet").is_symlink() and (out / ".replaced-1" / "unet").readlink() == base
    link = tmp_path / "link"
    link.symlink_to(out, target_is_directory=True)
    put(link, PART, overwrite=True)
    assert link.is_symlink() and PART.items() <= tree(out).items()


def test_the_same_run_goes_on_and_another_does_not(tmp_path):
    def begin(run, kind="training", **options):
        with claimed(tmp_path, kind, run, continues=("log.jsonl",), **options):
            record_written(tmp_path, "log.jsonl")
            with (tmp_path / "log.jsonl").open("a") as file:
                file.write("{}\n")

    begin({"seed": 0, "list": [1]})
    begin({"seed": 0, "list": [1]})
    for run, kind in (({"seed": 1, "list": [1]}, "training"), ({"seed": 0, "list": [1]}, "another kind")):
        with pytest.raises(OutputFolderError, match="log.jsonl"):
            begin(run, kind)
    assert (tmp_path / "log.jsonl").read_text() == "{}\n{}\n"
    begin({"seed": 1}, overwrite=True, at_once=True)
    assert (tmp_path / "log.jsonl").read_text() == "{}\n"


def test_a_folder_without_a_record_is_known_by_what_the_caller_sees_in_it(tmp_path):
    fill(tmp_path, **{"results.json": "old"})
    claim = {"kind": "report", "run": 1, "continues": ("results.json",)}
    with pytest.raises(OutputFolderError), claimed(tmp_path, **claim):
        pass
    fill(tmp_path, **{"results.json": "another's"})
    with claimed(tmp_path, **claim, is_own=lambda folder: False, overwrite=True):
        write_own(tmp_path / "results.json", "new")
    assert tree(tmp_path) == {"results.json": "new", ".replaced-1/results.json": "another's"}


def test_what_an_earlier_version_wrote_is_replaced_by_the_same_run(tmp_path):
    fill(tmp_path, **{"results.json": "old"})
    with claimed(tmp_path, "report", 1, continues=("results.json",), is_own=lambda folder: True):
        write_own(tmp_path / "results.json", "new")
    assert tree(tmp_path) == {"results.json": "new"}


def test_empty_folders_and_files_hold_nothing(tmp_path):
    (tmp_path / "unet" / "below").mkdir(parents=True)
    (tmp_path / "erasure.json").touch()
    put(tmp_path, PART)
    assert tree(tmp_path) == PART


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        '{"runs": 1, "files": 2}',
        "[" * 100_000,
        '{"runs": {}, "files": {"../victim": null, "/etc": 1}}',
    ],
)
def test_a_broken_or_hostile_record_deletes_nothing(tmp_path, record):
    out = tmp_path / "out"
    fill(tmp_path, victim="mine")
    fill(out, **{name.replace("/", "__"): text for name, text in FULL.items()}, **{RECORD: record})
    put(out, PART, overwrite=True)
    assert (tmp_path / "victim").read_text() == "mine"
    assert tree(out) == {**PART, **{f".replaced-1/{name}": text for name, text in FULL.items()}}


def test_a_run_that_fails_leaves_no_folder_that_was_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "a" / "b"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_one_file_of_another_is_replaced_only_if_asked(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("mine")
    with pytest.raises(OutputFolderError, match="table.md: was not written by this program; give --overwrite"):
        check_own_file(tmp_path, path)
    write_own(path, "first")
    check_own_file(tmp_path, path)
    write_own(path, "second")
    assert path.read_text() == "second" and tree(tmp_path / ".replaced-1") == {"table.md": "mine"}
    make_way(tmp_path, ["table.md"])
    assert not path.exists() and len(list(tmp_path.glob(".replaced-*"))) == 1


# --- one at a time ---------------------------------------------------------------------------------------------------


HOLD = """
import sys, time
from diffusers_safe.output_folders import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has claimed the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_a_killed_one_is_in_nobodys_way(tmp_path, holder, monkeypatch):
    link = tmp_path.with_name("link")
    link.symlink_to(tmp_path)
    for folder in (tmp_path, link, os.path.relpath(tmp_path)):
        for claim in (claimed(folder), claimed(folder, overwrite=True)):
            with pytest.raises(OutputFolderError, match="another run is at work there"), claim:
                pass
        with pytest.raises(OutputFolderError, match="another run is at work there"):
            check_claim(folder)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with claimed(tmp_path):  # of one launch only the first process claims
        pass
    monkeypatch.setenv("RANK", "0")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    check_claim(tmp_path)
    with claimed(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()
    link.unlink()


@pytest.mark.parametrize("environment", [
    {"RANK": "1"}, {"RANK": "abc"}, {"RANK": ""}, {"RANK": "-1"}, {"PMI_RANK": "1"}, {"OMPI_COMM_WORLD_RANK": "1"},
    {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "abc", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "x"},
])  # fmt: skip
def test_a_rank_left_in_the_environment_of_a_single_process_claims_all_the_same(environment, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(OutputFolderError, match="holds results of another run"):
        check_claim(tmp_path, kind="result", replaces=["model_index.json"])
    with pytest.raises(OutputFolderError, match="holds results of another run"):
        with claimed(tmp_path, kind="result", replaces=["model_index.json"]):
            pass


COUNT = """
import sys, time
from pathlib import Path
from diffusers_safe.output_folders import OutputFolderError, claimed
folder, end, held = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    try:
        with claimed(folder):
            (folder / "inside").mkdir()  # fails where another is inside
            (folder / "inside").rmdir()
            held += 1
    except OutputFolderError:
        pass
print(held)
"""


def test_a_lock_that_is_unlinked_while_it_is_held_lets_no_second_run_in(tmp_path):
    (tmp_path / "kept").touch()
    runs = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path), "1"], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0] and sum(map(int, told)) > 10


def test_a_full_disk_names_the_folder(tmp_path):
    with (
        pytest.raises(OSError, match=r"output_dir .*: cannot be written \(no space left on the disk\)"),
        claimed(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="gone"), claimed(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_claim_is_refused_in_the_same_process_and_thread_too(tmp_path):
    with claimed(tmp_path), pytest.raises(OutputFolderError, match="another run is at work there"), claimed(tmp_path):
        pass


def test_claims_end_with_their_block(tmp_path):
    for _ in range(3):
        with claimed(tmp_path / "out", "a", 1) as folder:
            record_written(folder, "x")
        time.sleep(0)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["runs"] == {"a": 1}


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0b", r"a\\0b: must be UTF-8 text without null"),
        ("caf\udce9", r"caf\\udce9: must be UTF-8"),
        ("\ud800/x", "must be UTF-8"),
        ("n" * 256, "is too long"),
        ("é" * 128, "is too long"),
        ("x/" * 2000, "is too long"),
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("loop/below/this", "Too many levels of symbolic links"),
        ("dangling", "is a dangling link"),
        ("dangling/below", "is a dangling link"),
        ("to_file", "Not a directory"),
    ],
)
def test_a_path_that_cannot_be_written_is_one_line_before_any_work(tmp_path, path, message):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "to_file").symlink_to(tmp_path / "file")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputFolderError, match=message) as error:
        check_output_dir(path if not path.strip() else f"{tmp_path}/{path}")
    assert "\n" not in str(error.value) and str(error.value).encode() and str(error.value).startswith("output_dir ")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputFolderError, match="Permission denied"):
        check_output_dir(tmp_path / "below")


@pytest.mark.parametrize("path", ["new", "new/below/it", "é" * 100, "with space", "-dash", ".", "link", "link/new"])
def test_other_paths_are_fine_and_nothing_is_made(tmp_path, path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    assert check_output_dir(path) == Path(path)
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]
    with claimed(path):
        pass


@pytest.mark.parametrize("output", ["model", "model/unet", "model/new", "link", "link/new", "x/../model"])
def test_an_output_folder_in_what_is_read_is_refused(tmp_path, output):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(OutputFolderError, match="the base model's own folder; give another"):
        check_apart(tmp_path / output, tmp_path / "model", "the base model")
    check_apart(tmp_path / "model-2", tmp_path / "model", "the base model")
    check_apart(tmp_path, tmp_path / "model", "the base model")


@pytest.mark.parametrize("final", [True, False], ids=["a result", "a log"])
def test_a_file_that_was_changed_after_the_run_is_the_users(tmp_path, final):
    with claimed(tmp_path, "training", 1):
        (tmp_path / "file.json").write_text("ours")
        record_written(tmp_path, *(() if final else ["file.json"]), states=states_of(tmp_path) if final else None)
    os.utime(tmp_path / "file.json", ns=(1, 1))  # the same size
    (tmp_path / "file.json").write_text("mine")
    make_way(tmp_path, ["file.json"])
    assert (tmp_path / ".replaced-1" / "file.json").read_text() == "mine"


# --- what lies under our own names -----------------------------------------------------------------------------------


def test_a_lock_file_with_content_is_anothers(tmp_path):
    (tmp_path / LOCK).write_text("mine")
    for claim in (claimed(tmp_path).__enter__, lambda: check_claim(tmp_path)):
        with pytest.raises(OutputFolderError, match="holds a file .lock of another program"):
            claim()
    assert (tmp_path / LOCK).read_text() == "mine"


def test_a_record_that_is_no_file_or_damaged_owns_nothing(tmp_path):
    os.mkfifo(tmp_path / RECORD)
    assert not _Written(tmp_path).files  # and does not wait for a writer
    for files in ('[["a", null], [1, null]]', '{"a": [1]}', '{"a": ["1", 2]}', '{"../a": null}', '{"\\ud800": null}',
                  json.dumps({"a" * 300: None})):  # fmt: skip
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / RECORD).write_text(f'{{"runs": {{}}, "files": {files}}}')
        assert not _Written(other).files, files


@pytest.mark.parametrize("name", ["erasure.json", RECORD])
def test_a_folder_where_a_file_is_to_be_written_is_refused_before_any_work(tmp_path, name):
    fill(tmp_path / name, x="mine")
    with pytest.raises(OutputFolderError, match=f"{name} is a folder, where a file is to be written"):
        check_claim(tmp_path, replaces=RESULTS, overwrite=True)


def test_what_is_written_aside_never_follows_a_link(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path, mine="mine")
    (tmp_path / "out" / ".a.txt.partial").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "out" / "a.txt", "ours")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "out" / "a.txt").read_text() == "ours"


@pytest.mark.parametrize("place", ["file", "folder", "link"])
def test_what_a_killed_run_wrote_aside_goes_and_anothers_file_is_moved(tmp_path, place, caplog):
    aside = tmp_path / ".result.partial"
    fill(aside, **{"unet__a.safetensors": "x", "model_index.json": "{}", "tokenizer__merges.txt": "x"})
    remove_leftover(tmp_path, aside.name)
    remove_leftover(tmp_path, aside.name)  # of what is not there nothing
    assert not aside.exists() and not caplog.messages
    moved = tmp_path / ".replaced-1" / aside.name
    if place == "file":
        aside.write_text("mine")
    elif place == "folder":
        fill(aside, mine="mine")
        moved = moved / "mine"
    else:
        fill(tmp_path, target="mine")
        aside.symlink_to(tmp_path / "target")
    remove_leftover(tmp_path, aside.name)
    assert not os.path.lexists(aside) and moved.read_text() == "mine"
    assert "files that this program did not write were moved to" in caplog.text
