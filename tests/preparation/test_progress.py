"""Output folders of stopped, finished, damaged and other preparations are recognised."""

import hashlib
import json
from importlib import import_module
from pathlib import Path

import pytest
from filelock import FileLock

from diffusers_safe import cli
from prepared_data import hashes, picture_folder, prepare, refused


@pytest.fixture
def pictures(tmp_path):
    return picture_folder(tmp_path / "pictures", 5)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_folders_with_other_files_or_another_preparation_are_refused(tmp_path, pictures, out, capsys):
    message = refused(capsys, pictures, "--output_dir", pictures)
    assert "holds something else (00.png); give an empty or a new folder, or --overwrite to replace them" in message
    prepare(pictures, out)
    before = hashes(out)
    message = refused(capsys, pictures, "--output_dir", out, "--min_side", 9)
    assert "holds another preparation (min_side 1, not 9)" in message
    (pictures / "00.txt").write_text("another caption")
    assert "holds another preparation (table " in refused(capsys, pictures, "--output_dir", out)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, pictures, "--output_dir", tmp_path / "file")
    assert hashes(out) == before


@pytest.fixture
def stopped(pictures, out, monkeypatch):
    """The output folder of a run that was stopped before it wrote the report; 3 shards."""

    def stop(path, text):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(import_module("diffusers_safe.preparation.prepare"), "write_own", stop)
        with pytest.raises(SystemExit, match="error: the disk is full"):
            cli.main(["prepare-data", str(pictures), "--output_dir", str(out), "--shard_size", "2"])
    return out


def test_a_stopped_run_continues_with_the_same_settings_only(pictures, stopped, capsys):
    message = refused(capsys, pictures, "--output_dir", stopped, "--shard_size", 3)
    assert "holds another preparation (shard_size 2, not 3)" in message
    with FileLock(stopped / ".lock"):
        assert "another run is at work there" in refused(capsys, pictures, "--output_dir", stopped, "--shard_size", 2)
    assert prepare(pictures, stopped, "--shard_size", 2)["shards"] == 3


def test_broken_records_are_refused(pictures, stopped, capsys):
    options = ("--output_dir", stopped, "--shard_size", 2)
    record = stopped / ".preparation" / "00001.json"
    good = json.loads(record.read_text())
    damaged = [{"candidates": value} for value in (-1, 99, 10**30, "1", 1.5, True, None)]
    damaged += [{"dropped": value} for value in ("abc", {"a": "b"}, {"a": -1}, {"a": 1}, [1], None)]
    damaged += [{"kept": value} for value in (-3, "1", None, 5)]
    damaged += [{"hashes": value} for value in ([], [1, 2], ["a", "a"], "ab", None)]
    damaged += [{"changed": "x"}, {"examples": None}, {"examples": {"a": 1}}]
    for text in ["{", "[1]", "[" * 100_000, *(json.dumps({**good, **wrong}) for wrong in damaged)]:
        record.write_text(text)
        assert "00001.json: broken record; delete it" in refused(capsys, pictures, *options)
    record.write_text(json.dumps(good))
    (stopped / "train-00001.tar").unlink()
    assert "train-00001.tar was finished and is missing; delete " in refused(capsys, pictures, *options)
    record.unlink()  # as the messages say
    assert prepare(pictures, stopped, "--shard_size", 2)["shards"] == 3


def test_damaged_results_are_refused_and_replaced_with_overwrite(pictures, out, capsys):
    report = prepare(pictures, out, "--shard_size", 2)
    whole, options = hashes(out), ("--output_dir", out, "--shard_size", 2)
    damaged = [{"dropped": [1]}, {"rows": None}, {"rows": 9}, {"changed": "x"}, {"shards": "many"}, {"shards": 10**9},
               {"examples": None}, {"kept": -3}, {"kept": "3"}]  # fmt: skip
    texts = [json.dumps({key: value for key, value in report.items() if key != "rows"})]
    for text in [*texts, *(json.dumps({**report, **wrong}) for wrong in damaged)]:
        (out / "report.json").write_text(text)
        assert "report.json is damaged; give an empty or a new folder, or --over" in refused(
            capsys, pictures, *options
        )
    for text in ("[]", "[" * 100_000):
        (out / "report.json").write_text(text)
        assert "report.json was not written by prepare-data" in refused(capsys, pictures, *options)
    (out / "report.json").write_text(json.dumps(report))
    (out / "train-00001.tar").unlink()
    assert "train-00001.tar was finished and is missing; give " in refused(capsys, pictures, *options)
    assert prepare(pictures, out, "--shard_size", 2, "--overwrite") == report
    assert (out / ".replaced-1" / "report.json").is_file()  # it was changed by hand
    shards = sorted(out.glob("train-*"))
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in shards] == [whole[path.name] for path in shards]


def test_overwrite_deletes_the_shards_of_another_preparation_and_keeps_other_files(pictures, out, capsys):
    prepare(pictures, out, "--shard_size", 2)
    for name in ("notes.txt", "train-00007.tar"):
        (out / name).write_text("mine")
    options = ("--output_dir", out, "--shard_size", 3)
    before = hashes(out)
    assert "--overwrite to replace them" in refused(capsys, pictures, *options)
    assert hashes(out) == before
    cli.main(["prepare-data", str(pictures), *map(str, options), "--overwrite"])
    shards = {path.name for path in out.glob("train-*")}
    assert shards == {"train-00000.tar", "train-00001.tar"} and (out / "notes.txt").read_text() == "mine"
    assert (out / ".replaced-1" / "train-00007.tar").read_text() == "mine"
    assert json.loads((out / "report.json").read_text())["settings"]["shard_size"] == 3


@pytest.mark.parametrize("shards", [3, 10**9])
def test_files_with_the_names_of_shards_are_moved(pictures, out, shards):
    out.mkdir()
    for number in range(3):
        (out / f"train-0000{number}.tar").write_text("mine")
    (out / "report.json").write_text(json.dumps({"shards": shards, "settings": {"format": "webdataset"}}))
    assert prepare(pictures, out, "--overwrite")["shards"] == 1
    assert {path.name for path in out.glob("train-*")} == {"train-00000.tar"}
    moved = {path.name for path in (out / ".replaced-1").iterdir()}
    assert moved == {"report.json", *(f"train-0000{number}.tar" for number in range(3))}


def test_other_files_in_the_state_folder_are_kept(pictures, out):
    (out / ".preparation").mkdir(parents=True)
    for name in ("my_notes.txt", "00000.json"):  # a record without settings is not used
        (out / ".preparation" / name).write_text("mine")
    for options in ([], ["--overwrite", "--resize", "9"]):
        cli.main(["prepare-data", str(pictures), "--output_dir", str(out), *options])
        assert [path.name for path in (out / ".preparation").iterdir()] == ["my_notes.txt"]
    assert not (out / ".replaced-1").exists()


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize("name, kind", [(".preparation", "file"), (".preparation", "link"), ("report.json", "folder")])
def test_links_and_folders_in_the_way_are_refused(tmp_path, pictures, out, capsys, name, kind, options):
    out.mkdir()
    make = {"file": Path.touch, "folder": Path.mkdir, "link": lambda path: path.symlink_to(tmp_path)}[kind]
    make(out / name)
    message = refused(capsys, pictures, "--output_dir", out, *options)
    assert f"{name} is a {kind}" in message and [path.name for path in out.iterdir()] == [name]
