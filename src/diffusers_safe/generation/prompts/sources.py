"""Reads files and datasets of prompts into one `dict` for each row, without guessing types.

Values of text files remain text, because seeds may be as large as 2^64 - 1 and a guess would round them to floats.
"""

import codecs
import csv
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import pyarrow.parquet
import yaml
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ...yaml_files import TextLoader
from .layouts import column_key


TEMPLATE = "template"  # key of a YAML file
MAX_ROWS = 10**7  # combinations of its lists
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FIELD = re.compile(r"\{(\w*)\}")
_FORMATTED_FIELD = re.compile(r"\{(\w*)[!:.\[][^{}]*\}")


def is_file(text: str) -> bool:
    """Whether a text names a file and is not a prompt."""
    return Path(text).suffix.lower() in _READERS


def is_source(text: str) -> bool:
    """Whether a single text names a file or dataset and is not a prompt."""
    return is_file(text) or os.path.isdir(text) or bool(_HUB_ID.fullmatch(text))


def read_records(source: str, prompt_column: str, config_name: str | None, split: str | None) -> list[dict]:
    """Reads all rows of a file, the folder of a dataset, or a dataset on the Hub.

    Raises:
        `ValueError`: If it cannot be read or has no rows.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    is_dataset = os.path.isdir(path) or reader is None
    for name, value in (("dataset_config_name", config_name), ("split", split)):
        if value is not None and not is_dataset:
            raise ValueError(f"{name} '{value}': has no effect on {source}, which is a file")
    try:
        records = _dataset(source, config_name, split) if is_dataset else reader(path, prompt_column)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        csv.Error,
        yaml.YAMLError,
        DatasetsError,
        RecursionError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"prompts {source}: cannot be read ({reason})") from None
    if not records:
        raise ValueError(f"prompts {source}: has no rows")
    return records


def check_template(template: str, name: str) -> None:
    """
    Raises:
        `ValueError`: If a template has no fields, or one with a Python format (`{object:>10}`).
    """
    if wrong := _FORMATTED_FIELD.search(template):
        raise ValueError(f"{name} '{template}': {wrong[0]} is not a field; write {{{wrong[1]}}}")
    if not fields_of(template):
        raise ValueError(f"{name} '{template}': has no {{}} for the prompt, nor {{name}} for a column")


def fields_of(template: str) -> list[str]:
    """The names of a template's fields, each once. The name of `{}` is empty."""
    return list(dict.fromkeys(_FIELD.findall(template)))


def fill(template: str, values: dict[str, str], prompt: str | None = None) -> str:
    """Fills the fields of a template: `{}` with the prompt, `{name}` with a value.

    Raises:
        `ValueError`: If a value is missing.
    """

    def value(field: re.Match) -> str:
        found = values.get(field[1]) if field[1] else prompt
        if found is None:
            raise ValueError(f"template '{template}': no value for {field[0]}, only for {', '.join(values) or 'none'}")
        return str(found)

    return _FIELD.sub(value, template)


def _read_text(path: Path) -> str:
    """Reads a text file in UTF-8, or in UTF-16 with the byte order mark that spreadsheets write."""
    data = path.read_bytes()
    return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")


def _table(path: Path, prompt_column: str) -> list[dict]:
    text, delimiter = _read_text(path), None
    if hint := re.match(r"sep=(.)\r?\n", text):  # written by spreadsheets
        delimiter, text = hint[1], text[hint.end() :]
    table = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter or _delimiter(text, path, prompt_column), strict=True
    )
    names = table.fieldnames or []
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"two columns are called '{twice[0]}'")
    records = []
    for number, record in enumerate(table, 1):
        if None in record or None in record.values():
            more = "more" if None in record else "fewer"
            raise ValueError(f"row {number} has {more} values than the header has columns")
        records.append(record)
    return records


def _delimiter(text: str, path: Path, prompt_column: str) -> str:
    """The first delimiter with which the header has a column of prompts."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    for delimiter in (usual, *",;\t|"):
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
        if column_key(prompt_column) in map(column_key, header):
            return delimiter
    return usual


def _load_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_different_keys)


def _different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key '{next(name for name in keys if names.count(name) > 1)}' twice")
    return keys


def _json_lines(path: Path) -> list[dict]:
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                record = _load_json(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"line {number}: holds {record!r:.40}, not an object of columns and values")
            records.append(record)
    return records


def _json(path: Path, prompt_column: str) -> list[dict]:
    entries = _load_json(_read_text(path))
    if not isinstance(entries, list) or not all(isinstance(entry, (str, dict, NoneType)) for entry in entries):
        raise ValueError("must hold a list of prompts, or of objects of columns and values")
    return [entry if isinstance(entry, dict) else {prompt_column: entry} for entry in entries]


def _lines(path: Path, prompt_column: str) -> list[dict]:
    lines = [line.strip() for line in _read_text(path).split("\n")]
    return [{prompt_column: line} for line in lines if line and not line.startswith("#")]


def _product(path: Path, prompt_column: str) -> list[dict]:
    """Fills the template of a YAML file with every combination of its lists."""
    parts = yaml.load(_read_text(path), TextLoader)
    if not isinstance(parts, dict) or not isinstance(parts.get(TEMPLATE), str):
        raise ValueError(f"must hold `{TEMPLATE}:` with fields such as {{object}}, and a list of words for each")
    template = parts.pop(TEMPLATE)
    check_template(template, TEMPLATE)
    fields = fields_of(template)
    for name in dict.fromkeys([*fields, *parts]):
        words = parts.get(name)
        if name not in fields:
            raise ValueError(f"{name}: has no field {{{name}}} in '{template}'")
        if not isinstance(words, list) or not words:
            raise ValueError(f"{name or '{}'}: must be a list of words for '{template}'")
        for position, word in enumerate(words, 1):
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"{name or '{}'}, entry {position}: is empty or not text; a list of words is needed")
    if (count := math.prod(len(parts[name]) for name in fields)) > MAX_ROWS:
        raise ValueError(f"{count:,} combinations; at most {MAX_ROWS:,} are allowed")
    combinations = (dict(zip(fields, words)) for words in itertools.product(*(parts[name] for name in fields)))
    return [{prompt_column: fill(template, words), **words} for words in combinations]


def _parquet(path: Path, prompt_column: str) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


_READERS = {
    ".csv": _table,
    ".tsv": _table,
    ".jsonl": lambda path, prompt_column: _json_lines(path),
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _lines,
    ".yaml": _product,
    ".yml": _product,
}
ENDINGS = tuple(_READERS)


def _dataset(source: str, config_name: str | None, split: str | None) -> list[dict]:
    folder = Path(source)
    if models := [name for name in ("model_index.json", "config.json") if (folder / name).is_file()]:
        raise ValueError(f"it holds {models[0]}: a model's folder, not a dataset's")
    if folder.is_dir() and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
        dataset = load_from_disk(source)
        if isinstance(dataset, DatasetDict):
            if (split or "train") not in dataset:
                raise ValueError(f"split '{split or 'train'}': unknown; allowed are {', '.join(dataset)}")
            dataset = dataset[split or "train"]
    else:
        dataset = load_dataset(source, config_name, split=split or "train")
    return list(_plain(dataset))


def _plain(dataset: Dataset) -> Iterator[dict]:
    names = [name for name, feature in dataset.features.items() if not hasattr(feature, "decode_example")]
    yield from dataset.select_columns(names)  # without images and audio
