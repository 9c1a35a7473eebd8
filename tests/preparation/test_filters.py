"""Filters drop rows before and after the download, and are counted."""

import json

from prepared_data import captions, members, prepare, write_table


def test_filters_and_their_counts(server, tmp_path):
    rows = [
        {"URL": server.url("0.png"), "TEXT": "a small cat", "score": 6.5},
        {"URL": server.url("1.png"), "TEXT": "a KNIFE, sharp", "score": 7.0},
        {"URL": server.url("2.png"), "TEXT": "penknifes are other words", "score": 7.0},
        {"URL": server.url("3.png"), "TEXT": "in the style of van gogh", "score": 7.0},
        {"URL": server.url("4.png"), "TEXT": "a cat", "score": 9.0},
        {"URL": server.url("5.png"), "TEXT": " ", "score": 9.0},
        {"URL": server.url("6.png"), "TEXT": None, "score": 9.0},
        {"URL": server.url("7.png"), "TEXT": "not pretty", "score": 5.9},
        {"URL": server.url("8.png"), "TEXT": "no score", "score": None},
        {"URL": server.url("size-39x80.png"), "TEXT": "too narrow", "score": 6.0},
        {"URL": server.url("size-40x81.png"), "TEXT": "too long", "score": 6.0},
        {"URL": server.url("size-80x40.png"), "TEXT": "just right", "score": 6.0},
    ]
    (tmp_path / "forbidden.txt").write_text("# words\nknife\nVan Gogh\n")
    table = write_table(tmp_path / "table.csv", rows)
    options = ("--url_column", "URL", "--caption_column", "TEXT", "--aesthetic_column", "score", "--min_aesthetic", 6,
               "--min_side", 40, "--max_aspect_ratio", 2, "--min_caption_length", 6,
               "--forbidden_concepts", tmp_path / "forbidden.txt")  # fmt: skip
    report = prepare(table, tmp_path / "out", *options)
    assert captions(tmp_path / "out") == ["a small cat", "penknifes are other words", "just right"]
    assert report["dropped"] == {
        "forbidden concept": 2,
        "no caption": 2,
        "aspect ratio": 1,
        "low aesthetic score": 1,
        "no aesthetic score": 1,
        "short caption": 1,
        "short side": 1,
    }
    assert sorted(server.requests) == ["0.png", "2.png", "size-39x80.png", "size-40x81.png", "size-80x40.png"]
    assert json.loads(dict(members(tmp_path / "out"))["000002.json"])["aesthetic"] == 6.0
    requests = len(server.requests)
    assert (
        prepare(table, tmp_path / "out", *options) == report and len(server.requests) == requests
    )  # a finished preparation is not repeated
