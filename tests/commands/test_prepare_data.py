"""`diffusers-safe prepare-data` refuses invalid input; tests/preparation has the rest."""

import os

import datasets
import pytest

from prepared_data import picture_folder, refused, write_table


@pytest.mark.parametrize(
    "options, message",
    [
        (["{folder}", "--format", "zip"], "format 'zip': unknown; allowed are webdataset, parquet"),
        (["{folder}", "--shard_size", "0"], "shard_size 0: must be at least 1"),
        (["{folder}", "--resize", "0"], "resize 0: must be at least 1"),
        (["{folder}", "--jpeg_quality", "96"], "jpeg_quality 96: must be at least 1 and at most 95"),
        (["{folder}", "--timeout", "0"], "timeout 0.0: must be greater than 0"),
        (["{folder}", "--retries", "-1"], "retries -1: must be at least 0"),
        (["{folder}", "--concurrency", "0"], "concurrency 0: must be at least 1"),
        (["{folder}", "--user_agent", "two\nlines"], "user_agent 'two\\nlines': must be one line of ASCII"),
        (["{folder}", "--max_aspect_ratio", "0.5"], "max_aspect_ratio 0.5: must be at least 1"),
        (["{folder}", "--min_side", "0"], "min_side 0: must be at least 1"),
        (["{folder}", "--min_aesthetic", "5"], "min_aesthetic 5.0: needs aesthetic_column"),
        (["{table}", "--aesthetic_column", "score"], "aesthetic_column 'score': needs min_aesthetic"),
        (["{folder}", "--forbidden_concepts", "no.txt"], "concepts file no.txt: no such file"),
        (["{folder}", "--split", "test"], "split 'test': does not apply to "),
        (["{folder}", "--url_column", "URL"], "url_column 'URL': does not apply to "),
        (["{table}", "--dataset_config_name", "x"], "dataset_config_name 'x': does not apply to "),
        (["{table}", "--split", "test"], 'Unknown split "test"'),
        (["{table}", "--url_column", "URL"], "no column 'URL', only url, text, score, tags"),
        (["{table}", "--caption_column", "TEXT"], "no column 'TEXT', only url, text, score, tags"),
        (["{table}", "--caption_column", "tags"], "column 'tags' contains List, not plain values"),
        (["{folder}", "--aesthetic_column", "score", "--min_aesthetic", "5"], "no column 'score', only file_name"),
        (["no.parquet"], "source no.parquet: no such file"),
        (["no-*.csv"], "source no-*.csv: no such file"),
        (["no/where"], "source no/where: "),
        (
            ["{empty}"],
            "neither metadata.csv, metadata.jsonl, metadata.parquet, nor a .txt file next to an image, nor",
        ),
        (["{empty}"], "the folder contains no files"),
        (["{table}", "--allow_private"], "unrecognized arguments: --allow_private"),
        (["{broken}"], "broken.parquet: "),
        (["{nothing}"], "nothing.csv: has no rows"),
        ([], "required: --source"),
    ],
)
def test_invalid_input_is_reported_in_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    picture_folder(tmp_path / "folder", 1)
    row = {"url": "http://127.0.0.1:9/x.png", "text": "x", "score": 5.0, "tags": ["a"]}
    write_table(tmp_path / "table.jsonl", [row])
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    (tmp_path / "nothing.csv").write_text("url,text\n")
    files = {name.split(".")[0]: tmp_path / name for name in os.listdir(tmp_path)}
    printed = refused(capsys, *(option.format(**files) for option in options), "--output_dir", tmp_path / "out")
    assert message in printed and not (tmp_path / "out").exists()
