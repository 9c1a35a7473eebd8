"""Tables, folders, tar files and datasets on the Hub are read as rows."""

import csv
import hashlib
import io
import json
import tarfile
from functools import partial
from pathlib import Path

import datasets
import pandas as pd
import pytest

from picture_files import encoded
from prepared_data import captions, members, picture, picture_folder, prepare, refused, web_table, write_table


def test_folders_with_text_files_or_metadata(tmp_path):
    folder = picture_folder(tmp_path / "pictures", 3)
    picture(8).save(folder / "lonely.png")
    (folder / "01.png").write_bytes(b"no picture")
    assert prepare(folder, tmp_path / "pairs")["dropped"] == {"no caption": 1, "not a picture": 1}
    assert captions(tmp_path / "pairs") == ["picture 0", "picture 2"]
    about = json.loads(dict(members(tmp_path / "pairs"))["000001.json"])
    assert about["file_name"] == "02.png"
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "title"], ["02.png", "the second"], ["gone.png", "x"]])
    report = prepare(folder, tmp_path / "metadata", "--caption_column", "title")
    assert report["dropped"] == {"no such file": 1} and captions(tmp_path / "metadata") == ["the second"]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "café"}\n', encoding="utf-8")
    prepare(folder, tmp_path / "jsonl", "--format", "parquet")
    assert datasets.load_dataset("parquet", data_dir=str(tmp_path / "jsonl"), split="train")["text"][:] == ["café"]


def test_patterns_and_splits_of_tables(server, tmp_path):
    for part in (1, 0):
        web_table(tmp_path / f"part-{part}[x].parquet", server, [f"{part * 2 + i}.png" for i in range(2)])
    pattern = tmp_path / "part-*.parquet"
    assert prepare(pattern, tmp_path / "all")["kept"] == 4
    assert captions(tmp_path / "all") == [f"caption of {i}.png" for i in range(4)]
    prepare(pattern, tmp_path / "some", "--split", "train[1:3]")
    assert captions(tmp_path / "some") == ["caption of 1.png", "caption of 2.png"]
    assert prepare(tmp_path / "part-1[x].parquet", tmp_path / "one")["kept"] == 2


def test_datasets_on_the_hub(server, tmp_path, monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config, split) == ("user/laion", "small", "test")
        return datasets.Dataset.from_list([{"url": server.url("1.png"), "text": "one"}])

    monkeypatch.setattr("diffusers_safe.preparation.table.load_dataset", load_dataset)
    prepare("user/laion", tmp_path / "out", "--dataset_config_name", "small", "--split", "test")
    assert captions(tmp_path / "out") == ["one"]


def img2dataset_folder(folder: Path, form: str, count: int = 6) -> Path:
    """The output of img2dataset: shards of three samples, each with a table and counts; the first has no picture."""
    folder.mkdir()
    for shard in range(count // 3 + 1):
        samples = [shard * 3 + i - 3 for i in range(3)] if shard else []
        facts = [
            {"key": f"{i:09}", "caption": f"picture {i}", "url": f"http://example.org/{i}", "score": i}
            for i in samples
        ]
        write_table(folder / f"{shard:05}.parquet", facts or [{"key": "x", "caption": "failed"}])
        (folder / f"{shard:05}_stats.json").write_text(json.dumps({"count": 3, "successes": len(samples)}))
        files = [
            (f"{fact['key']}.{ending}", content)
            for i, fact in zip(samples, facts)
            for ending, content in {
                "jpg": encoded(picture(i), "JPEG"),
                "json": json.dumps(fact).encode(),
                "txt": fact["caption"].encode(),
            }.items()
        ]
        if form == "webdataset":
            with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
                for name, content in files:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        else:
            (folder / f"{shard:05}").mkdir()
            for name, content in files:
                (folder / f"{shard:05}" / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_the_folders_of_img2dataset_are_read(tmp_path, form):
    folder = img2dataset_folder(tmp_path / "data[1]", form)
    report = prepare(folder, tmp_path / "out", "--shard_size", 4)
    assert (
        report["kept"] == 6
        and report["dropped"] == {}
        and captions(tmp_path / "out") == [f"picture {i}" for i in range(6)]
    )
    about = json.loads(dict(members(tmp_path / "out"))["000004.json"])
    assert about["sha256"] == hashlib.sha256(encoded(picture(4), "JPEG")).hexdigest()
    assert about["file_name"] == ("00002.tar/" if form == "webdataset" else "00002/") + "000000004.jpg"


def test_tar_files_have_fields_and_no_links(tmp_path, capsys):
    folder = img2dataset_folder(tmp_path / "data", "webdataset")
    options = ("--caption_column", "url", "--aesthetic_column", "score", "--min_aesthetic", 3)
    report = prepare(folder, tmp_path / "out", *options)
    assert report["dropped"] == {"low aesthetic score": 3}
    assert captions(tmp_path / "out") == [f"http://example.org/{i}" for i in (3, 4, 5)]
    message = refused(capsys, folder, "--output_dir", tmp_path / "none", "--caption_column", "TEXT")
    assert "no column 'TEXT', only key, caption, url, score, txt, in the tar files" in message
    with tarfile.open(folder / "00003.tar", "w") as tar:
        member = tarfile.TarInfo("1.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    message = refused(capsys, folder, "--output_dir", tmp_path / "none")
    assert "00003.tar: the member '1.jpg' is a link, which is not followed" in message


def test_the_error_lists_the_files_of_a_folder_without_captions(tmp_path, capsys):
    folder = picture_folder(tmp_path / "pictures", 2)
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "captions.csv").write_text("file,text\n")
    message = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert message.endswith("nor tar files; the folder contains 2 .png (00.png, ...) and 1 .csv (captions.csv)")


@pytest.mark.parametrize("name", ["pictures/metadata.jsonl", "table.jsonl", "table.json"])
@pytest.mark.parametrize("between", ["", "\n"])
def test_deeply_nested_json_is_refused(tmp_path, capsys, name, between):
    picture_folder(tmp_path / "pictures", 1)
    deep = f"[{between}" * 20_000 + "]" * 20_000
    path = tmp_path / name
    path.write_text('{"file_name": "00.png", "text": "[[\\"{{"}\n' * 99 + f'{{"file_name": "00.png", "text": {deep}}}')
    source = path.parent if path.parent.name == "pictures" else path
    message = refused(capsys, source, "--output_dir", tmp_path / "out")
    assert f"{path}, line {199 if between else 100}: JSON nested more than 100 levels deep" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.jsonl", b"", "table.jsonl: is empty"),
        ("table.jsonl", b"\n null\nnull\n", "table.jsonl, line 2: JSON objects are needed"),  # crashes pyarrow
        ("table.json", b'"text"', "table.json, line 1: JSON objects are needed"),
        ("table.jsonl", b'{"url": "\\ud800"}', "JSON parse error: The surrogate pair in string is invalid"),
        ("table.csv", b"url,text\na,caf\xe9\n", "'utf-8' codec can't decode"),
        ("table.csv", b"\0" * 99, "All the data files must have the same columns"),
        ("table.tsv", b"url\ttext\n", "must be a folder or a file that ends in .parquet, .csv, .jsonl, .json"),
        ("t.csv", b"URL,TEXT\n", "t.csv: has no rows"),
    ],
)
def test_broken_tables_are_refused_in_one_line(tmp_path, capfd, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refused(capfd, tmp_path / name, "--output_dir", tmp_path / "out")
    assert "Failed to" not in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_empty_values_and_columns_named_twice_are_refused(tmp_path, capsys):
    table = write_table(tmp_path / "table.csv", [{"url": "http://127.0.0.1/", "text": "x"}])
    refuse = partial(refused, capsys, "--output_dir", tmp_path / "out")
    assert "source '': is empty" in refuse("--source", "")
    for name in ("url_column", "caption_column", "aesthetic_column", "split", "user_agent"):
        assert f"{name} ' ': is empty" in refuse("--source", table, f"--{name}", " ")
    assert "column 'url': is named for two" in refuse("--source", table, "--caption_column", "url")


def test_captions_with_a_null_character_are_dropped(server, tmp_path):
    rows = [{"url": server.url(f"{i}.png"), "text": text} for i, text in enumerate(("a\0b", "c"))]
    report = prepare(write_table(tmp_path / "table.jsonl", rows), tmp_path / "out")
    assert report["kept"] == 1 and report["dropped"] == {"null character in the caption": 1}


def test_two_metadata_files_are_refused(tmp_path, capsys):
    folder = picture_folder(tmp_path / "pictures", 1)
    for name in ("metadata.csv", "metadata.jsonl"):
        write_table(folder / name, [{"file_name": "00.png", "text": name}])
    message = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert "metadata.csv and metadata.jsonl: only one of them can be read" in message


def test_metadata_without_rows_is_refused(tmp_path, capsys):
    folder = picture_folder(tmp_path / "pictures", 1)
    pd.DataFrame({"file_name": [], "text": []}).to_parquet(folder / "metadata.parquet")
    message = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert f"{folder}/metadata.parquet: has no rows" in message and not (tmp_path / "out").exists()


def write_tar(path: Path, mode: str = "w", name: str = "a", about: bytes = b"{}") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for ending, content in {"png": encoded(picture(1)), "txt": b"a caption", "json": about}.items():
            member = tarfile.TarInfo(f"{name}.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_tar_files_are_read_whole_or_refused(tmp_path, capsys):
    assert prepare(write_tar(tmp_path / "upper.tar" / "0.TAR").parent, tmp_path / "upper")["kept"] == 1
    whole = write_tar(tmp_path / "cut" / "0.tar")
    with tarfile.open(whole) as tar:
        header = tar.getmember("a.txt").offset
    content = whole.read_bytes()
    zeroed = write_tar(tmp_path / "zeroed" / "0.tar")
    zeroed.write_bytes(content[:header] + bytes(512) + content[header + 512 :])
    whole.write_bytes(content[: header + 100])
    bad = {
        f"{whole}: cannot be read as an uncompressed tar file (damaged or cut short at byte": whole,
        f"{zeroed}: cannot be read as an uncompressed tar file (damaged or cut short at byte": zeroed,
        "cannot be read as an uncompressed tar file": write_tar(tmp_path / "gz" / "0.tar", "w:gz"),
        "text of the member '\\udcff.png' is not UTF-8": write_tar(tmp_path / "name" / "0.tar", name="\udcff"),
        "text of the member 'a.png' is not UTF-8": write_tar(tmp_path / "s" / "0.tar", about=b'{"a": "\\ud800"}'),
    }
    for message, path in bad.items():
        assert message in refused(capsys, path.parent, "--output_dir", tmp_path / "out")
