"""Shards load with `datasets`."""

import hashlib

import datasets

from picture_files import encoded
from prepared_data import members, picture, prepare, web_table


def test_shards_load_with_datasets(server, tmp_path):
    table = web_table(tmp_path / "table.csv", server, [f"{i}.png" for i in range(5)])
    for form in ("webdataset", "parquet"):
        out = tmp_path / form
        prepare(table, out, "--format", form, "--shard_size", 2, "--resize", 20)
        for dataset in (
            datasets.load_dataset(form, data_dir=str(out), split="train"),
            datasets.load_dataset(str(out), split="train"),
            list(datasets.load_dataset(form, data_dir=str(out), split="train", streaming=True)),
        ):
            assert len(dataset) == 5
            row = dataset[3]
            image, text, about = (
                (row["jpg"], row["txt"], row["json"]) if form == "webdataset" else (row["image"], row["text"], row)
            )
            assert image.size == (24, 20) and image.mode == "RGB" and text == "caption of 3.png"
            assert about["url"] == server.url("3.png")
            assert (about["width"], about["height"], about["original_width"], about["original_height"]) == (
                24, 20, 48, 40)  # fmt: skip
            assert about["sha256"] == hashlib.sha256(encoded(picture(3))).hexdigest()
    assert [name for name, _ in members(tmp_path / "webdataset")][:4] == [
        "000000.jpg", "000000.txt", "000000.json", "000001.jpg"]  # fmt: skip
