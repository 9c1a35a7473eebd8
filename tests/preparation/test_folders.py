"""File names and links do not lead outside of a folder."""

from pathlib import Path

import pytest

from prepared_data import picture, picture_folder, prepare, refused, write_table


def outside(tmp_path) -> Path:
    (tmp_path / "private").mkdir()
    picture(9).save(tmp_path / "private" / "me.png")
    (tmp_path / "private" / "me.txt").write_text("a secret")
    return tmp_path / "private"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "name", ["../private/me.png", "{private}/me.png", "sub/../../private/me.png", "../pictures-2/x.png"]
)
def test_metadata_does_not_lead_outside(tmp_path, capsys, kind, name):
    private, folder = outside(tmp_path), picture_folder(tmp_path / "pictures", 2)
    name = name.format(private=private)
    write_table(folder / f"metadata.{kind}", [{"file_name": file, "text": "x"} for file in ("00.png", name)])
    message = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert f"me.png' lies outside of {folder}" in message or "x.png' lies outside" in message
    assert name in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", ["l.png", "00.txt", "folder", "l.tar", "metadata.csv"])
def test_links_do_not_lead_outside(tmp_path, capsys, link):
    private, folder = outside(tmp_path), picture_folder(tmp_path / "pictures", 2)
    (folder / link).unlink(missing_ok=True)
    (folder / link).symlink_to({"folder": private, "00.txt": private / "me.txt"}.get(link, private / "me.png"))
    message = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert f"{link}' lies outside of {folder}" in message and not (tmp_path / "out").exists()


def test_links_inside_are_followed(tmp_path):
    folder = picture_folder(tmp_path / "pictures", 2)
    (folder / "sub").mkdir()
    (folder / "sub" / "x.png").symlink_to("../00.png")
    (folder / "sub" / "x.txt").write_text("again")
    assert prepare(folder, tmp_path / "out")["dropped"] == {"same picture as before": 1}
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert prepare(tmp_path / "link", tmp_path / "linked")["kept"] == 2
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "0123", tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for name in ("00.png", "00.txt"):
        (snapshot / name).symlink_to(blobs / name)
    assert prepare(snapshot, tmp_path / "snapshot")["kept"] == 1


def test_hidden_files_are_left_out(tmp_path):
    folder = picture_folder(tmp_path / "pictures", 1)
    for name in ("._00", "__MACOSX/00", ".ipynb_checkpoints/00"):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(5).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(b"\0\5\x16\7")
    assert prepare(folder, tmp_path / "out")["rows"] == 1


def test_names_that_are_not_utf_8_are_refused(tmp_path, capsys):
    folder = picture_folder(tmp_path / "pictures", 1)
    (folder / "00.png").rename(folder / "\udcff.png")
    assert f"{folder}: the file name '\\udcff.png' is not UTF-8" in refused(capsys, folder, "--output_dir", "out")
