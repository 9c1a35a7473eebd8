"""Pictures with captions from any source of `datasets`, undecoded: what cannot be used is told before training."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import escape, glob
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import torch
from datasets.data_files import DataFilesList, get_data_patterns

from ...concepts import naming_pattern
from ...diffusion.generators import sample_generator
from ...preparation.folders import (
    METADATA,
    Boundary,
    captioned_pictures,
    check_depth,
    described,
    files_in,
    is_empty_tar,
)
from ...preparation.table import metadata_of


# The builders of `datasets` for data files; images in folders need none.
_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
}
STREAM_SHARDS = 64  # of a dataset on disk that is read as a stream
END_OF_FILE = 4096  # bytes of an image that its fingerprint depends on
# Where pictures and captions are unless it is said: of `datasets`, of webdatasets, of img2dataset's parquet files.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "txt", "caption")
NO_CAPTION = "without a caption"
FORBIDDEN = "with a caption that names a forbidden concept"


class DataError(ValueError):
    """Training data that cannot be used; found before the training starts."""

    exit_code = 2


class _NoColumn(ValueError):
    """A column that is not there."""


class CaptionedImages:
    """Rows of a dataset as pairs of an undecoded image and its captions; made by [`open_dataset`].

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): All rows of the source.
        image_column (`str`, *optional*): Holds images: files, their bytes, or paths of them. By default the first of
            `IMAGE_COLUMNS` that is there.
        caption_column (`str`, *optional*): Holds a caption or a list of them; `"json.caption"` is the field of a
            column. By default the first of `CAPTION_COLUMNS` that is there.
        forbidden_concepts (`list[str]`): A row with any caption that names one is dropped: the picture shows it.
        max_train_samples (`int`, *optional*): Keep only this many, drawn at random; of a stream the first.
        seed (`int`, defaults to 0): Of this draw.
        boundary ([`Boundary`], *optional*): Where the files of images must lie.

    Attributes:
        indices (`np.ndarray`, *optional*): The rows that are used, in ascending order; `None` for a stream, which
            tells as it is read.
        dropped (`Counter[str]`): How many rows were not, by reason.

    Raises:
        `ValueError`: If a column is missing, holds something else, or no row is left.
    """

    def __init__(
        self,
        rows: datasets.Dataset | datasets.IterableDataset,
        image_column: str | None = None,
        caption_column: str | None = None,
        forbidden_concepts: Iterable[str] = (),
        max_train_samples: int | None = None,
        seed: int = 0,
        boundary: Boundary | None = None,
    ):
        self.streaming = isinstance(rows, datasets.IterableDataset)
        columns = rows.column_names or list(_first(rows))  # a stream may not know
        self.image_column = image_column or _first_of(IMAGE_COLUMNS, columns)
        self.caption_path = (caption_column or _first_of(CAPTION_COLUMNS, columns)).split(".")
        self.forbidden_concepts = list(forbidden_concepts)
        self.boundary = boundary
        self.dropped: Counter[str] = Counter()
        self._check_columns(columns)
        self.rows = self._undecoded(rows)
        self.indices = None
        if self.streaming:
            self.captions_of(_first(self.rows))  # so that a field that is missing is told now
            self.rows = self.rows if max_train_samples is None else self.rows.take(max_train_samples)
        else:
            self._captions = self.rows.select_columns([self.caption_path[0]])
            self._check_files()
            self.indices = self._usable_rows(max_train_samples, seed)

    def _check_columns(self, columns: list[str]) -> None:
        for option, column in (("image_column", self.image_column), ("caption_column", self.caption_path[0])):
            if column not in columns:
                raise _NoColumn(f"{option} '{column}': no such column; there are {', '.join(columns)}")
        if self.image_column == self.caption_path[0]:
            raise ValueError(f"caption_column '{self.image_column}': is the image_column, too")

    def _undecoded(self, rows: datasets.Dataset | datasets.IterableDataset):
        rows = rows.select_columns([self.image_column, self.caption_path[0]])
        if rows.features is None:
            return rows
        try:
            return rows.cast_column(self.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, pa.ArrowException):
            kind = rows.features[self.image_column]
            raise ValueError(f"image_column '{self.image_column}': holds no images but {kind}") from None

    def _check_files(self) -> None:
        """Whether all files of images lie where they must."""
        if self.boundary is None or self.rows.features is None:
            return
        for table in self.rows.with_format("arrow").select_columns([self.image_column]).iter(batch_size=10_000):
            for chunk in table[self.image_column].chunks:
                held, paths = chunk.field("bytes"), chunk.field("path")
                self.boundary.check(paths.filter(held.is_null()).drop_null().to_pylist())

    def _usable_rows(self, max_train_samples: int | None, seed: int) -> np.ndarray:
        usable = []
        for index, captions in enumerate(self._captions_of_all_rows()):
            if reason := self.reason_to_drop(captions):
                self.dropped[reason] += 1
            else:
                usable.append(index)
        if not usable and not self.dropped:
            raise ValueError("the dataset is empty")
        if not usable:
            raise ValueError(f"no row of the dataset is left; dropped: {told(self.dropped)}")
        if max_train_samples is not None and max_train_samples < len(usable):
            order = torch.randperm(len(usable), generator=sample_generator(seed, "max_train_samples", 0))
            usable = sorted(usable[place] for place in order[:max_train_samples].tolist())
        return np.array(usable)

    def _captions_of_all_rows(self) -> Iterator[list[str]]:
        for batch in self._captions.iter(batch_size=1000):
            for value in batch[self.caption_path[0]]:
                yield self.captions_of({self.caption_path[0]: value})

    def captions_of(self, row: dict[str, Any]) -> list[str]:
        """The captions of a row, without those that are blank."""
        value = row
        for name in self.caption_path:
            if value is not None and (not isinstance(value, dict) or name not in value):
                there = f"; there are {', '.join(value)}" if isinstance(value, dict) else ""
                raise ValueError(f"caption_column '{'.'.join(self.caption_path)}': no field '{name}'{there}")
            value = None if value is None else value[name]
        captions = value if isinstance(value, list) else [value]
        for caption in captions:
            if caption is not None and not isinstance(caption, str):
                raise ValueError(
                    f"caption_column '{'.'.join(self.caption_path)}': must hold texts or lists of texts, not "
                    f"{type(caption).__name__}"
                )
        return [caption for caption in captions if caption and caption.strip()]

    def reason_to_drop(self, captions: list[str]) -> str | None:
        """Why a row with these captions is not used, if it is not."""
        if not captions:
            return NO_CAPTION
        if not self.forbidden_concepts:
            return None
        pattern = naming_pattern(tuple(self.forbidden_concepts))
        return FORBIDDEN if any(map(pattern.search, captions)) else None

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, place: int) -> dict[str, Any]:
        """The `place`-th row that is used."""
        return self.rows[int(self.indices[place])]

    def image_of(self, row: dict[str, Any]) -> Any:
        """The undecoded image of a row.

        Raises:
            `ValueError`: If it is a file outside of the boundary.
        """
        image = row[self.image_column]
        if self.boundary is not None and isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
            self.boundary.check([image["path"]])
        return image

    def file_name_of(self, row: dict[str, Any]) -> str | None:
        """The name of its file, if it has one."""
        image = self.image_of(row)
        return Path(image["path"]).name if isinstance(image, dict) and image.get("path") else None

    def name(self, place: int) -> str:
        """What the `place`-th row that is used is called in messages."""
        file_name = self.file_name_of(self.row(place))
        return f"row {self.indices[place]}" + (f", {file_name}" if file_name else "")

    def captions(self, place: int) -> list[str]:
        """The captions of the `place`-th row that is used, at least one; its image is not read."""
        return self.captions_of(self._captions[int(self.indices[place])])

    def all_captions(self) -> Iterator[list[str]]:
        """The captions of every row that is used, in order."""
        used = set(self.indices.tolist())
        return (captions for index, captions in enumerate(self._captions_of_all_rows()) if index in used)

    def fingerprint(self) -> str:
        """A hash of captions and images of all rows that are used, in order; the same wherever the dataset lies and
        however it was loaded. 16 hexadecimal digits.

        Of an image it takes the size of its file and the last 4 kB, which for PNG and JPEG depend on all of it.
        """
        digest = hashlib.sha256()
        used = set(self.indices.tolist())
        column = self.caption_path[0]
        images_and_captions = (
            pair
            for table in self.rows.with_format("arrow").iter(batch_size=1000)
            for pair in zip(table[self.image_column], table[column])
        )
        for index, (image, captions) in enumerate(images_and_captions):
            if index in used:
                digest.update(json.dumps(self.captions_of({column: captions.as_py()})).encode())
                digest.update(_size_and_end(image))
        return digest.hexdigest()[:16]


def _first_of(names: Iterable[str], columns: list[str]) -> str:
    return next((name for name in names if name in columns), next(iter(names)))


def _first(stream: datasets.IterableDataset) -> dict[str, Any]:
    if (row := next(iter(stream), None)) is None:
        raise ValueError("the dataset is empty")
    return row


def _size_and_end(image: pa.StructScalar) -> bytes:
    """The size of an image's file and its last bytes; without a copy of the others."""
    held, path = (image["bytes"], image["path"].as_py()) if image.is_valid else (pa.scalar(None), None)
    if held.is_valid:
        data = held.as_buffer()
        return len(data).to_bytes(8, "big") + bytes(memoryview(data)[-END_OF_FILE:])
    if path is None or not os.path.isfile(path):
        return f"no file {path}".encode()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END_OF_FILE))
        return size.to_bytes(8, "big") + file.read()


def open_dataset(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    data_files: list[str] | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    forbidden_concepts: Iterable[str] = (),
    max_train_samples: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    seed: int = 0,
) -> CaptionedImages:
    """Opens a dataset of captioned images.

    Args:
        dataset_name (`str`, *optional*): Id on the Hub.
        train_data_dir (`str`, *optional*): Folder: images with a metadata.jsonl, metadata.csv or metadata.parquet or
            a `.txt` file next to each (all of it is the split `"train"`), parquet files, tar files of WebDataset, or
            what `Dataset.save_to_disk` or `img2dataset` wrote. Files outside of it are not read.
        data_files (`list[str]`, *optional*): Files or patterns, local or URLs: parquet, arrow, tar, csv, json.
        dataset_config_name (`str`, *optional*): Of a dataset that has several; with `dataset_name` only.
        split (`str`, defaults to `"train"`): Which part.
        streaming (`bool`, defaults to `False`): Read it as training goes, without a copy on disk.
        cache_dir (`str`, *optional*): Where `datasets` keeps its files.

    The other arguments are those of [`CaptionedImages`].

    Raises:
        `DataError`: A `ValueError`: if not exactly one source is given, it cannot be opened, a column is missing, it
            is empty, or a file lies outside of the folder.
    """
    sources = {"dataset_name": dataset_name, "train_data_dir": train_data_dir, "data_files": data_files}
    given = {name: value for name, value in sources.items() if value}
    if len(given) != 1:
        raise DataError(f"{', '.join(given or sources)}: give exactly one of {', '.join(sources)}")
    ((option, source),) = given.items()
    settings = {"name": dataset_config_name, "split": split, "streaming": streaming, "cache_dir": cache_dir}
    try:
        rows = _load(option, source, **settings)
        boundary = _boundary(option, source, cache_dir)
        return CaptionedImages(
            rows, image_column, caption_column, forbidden_concepts, max_train_samples, seed, boundary
        )
    except Exception as error:  # at damaged files whatever their reader raises: an empty tar is an IndexError
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # which says what is wrong
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, _NoColumn) and option != "data_files" and os.path.isdir(source):
            reason += f"; the folder holds {described(files_in(Path(source)))}"
        if not isinstance(error, (OSError, ValueError)):
            reason = f"cannot be opened ({type(error).__name__}{reason and f': {reason}'})"
        raise DataError(f"{option} {source}: {reason}") from error


def _boundary(option: str, source: Any, cache_dir: str | None) -> Boundary | None:
    """Where the files of a source lie: in its folder, on the Hub, or where `datasets` keeps what it downloads and
    unpacks. Paths in data files that were named one by one are the user's own."""
    if option == "data_files":
        return None
    caches = [cache_dir or datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    if os.path.isdir(source):
        return Boundary(source, *caches)
    hub = ("hf://", datasets.config.HF_ENDPOINT.rstrip("/") + "/")
    return Boundary(*caches, huggingface_hub.constants.HF_HUB_CACHE, remote=hub)


def _load(option: str, source: Any, split: str, streaming: bool, **settings):
    if option != "dataset_name" and settings["name"] is not None:
        raise ValueError(
            f"dataset_config_name '{settings['name']}': means nothing for {option}, only for dataset_name"
        )
    if option == "dataset_name":
        if os.path.isdir(source):
            check_depth(files_in(Path(source)))  # and no links that lead out
        return datasets.load_dataset(source, split=split, streaming=streaming, **settings)
    if option == "data_files":
        kinds = {_BUILDERS.get(Path(file).suffix.lower()) for file in source}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(f"files of one kind are needed; kinds are {', '.join(_BUILDERS)}")
        if missing := [file for file in source if "://" not in file and not glob(file, recursive=True)]:
            raise ValueError(f"{missing[0]}: no such file")
        check_depth(path for file in source for path in glob(file, recursive=True) if os.path.isfile(path))
        files = {split: list(source)}
        return datasets.load_dataset(kinds.pop(), data_files=files, split=split, streaming=streaming, **settings)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError("no such folder")
    files = files_in(folder)
    kinds = {path.suffix.lower() for path in files}
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(source)
        if split not in splits:
            raise ValueError(f"no split '{split}'; there are {', '.join(splits)}")
        rows = splits[split]
    elif (folder / "state.json").is_file():
        rows = datasets.load_from_disk(source)
    elif any((folder / name).is_file() for name in METADATA):
        # As diffusers' examples; to look for splits among its files, `datasets` would list them 66 times.
        check_depth(path for path in files if path.name in METADATA)
        if streaming:
            metadata_of(folder)  # so that files that lie outside are reported now
        pattern = {"train": f"{escape(str(folder))}/**"}
        return datasets.load_dataset("imagefolder", data_files=pattern, split=split, streaming=streaming, **settings)
    elif ".tar" in kinds:
        tars = [path for path in files if path.suffix.lower() == ".tar" and not is_empty_tar(path)]
        return _load_files("webdataset", folder, tars, split, streaming, **settings)
    elif found := captioned_pictures(files):
        if split != "train":
            raise ValueError(f"no split '{split}'; pictures with .txt files are the split train")
        columns = {"image": list(map(str, found[0])), "text": found[1]}
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    elif {".parquet"} < kinds.intersection(_BUILDERS) and not any(path.name in METADATA for path in files):
        # `datasets` might take the others.
        tables = [path for path in files if path.suffix.lower() == ".parquet"]
        return _load_files("parquet", folder, tables, split, streaming, **settings)
    elif kinds.intersection((*_BUILDERS, ".zip")):
        check_depth(files)
        return datasets.load_dataset(source, split=split, streaming=streaming, **settings)
    else:
        raise ValueError(
            f"no pictures with captions ({', '.join(METADATA)}, or a .txt file next to each), no tar files and no"
            f" parquet files; the folder holds {described(files)}"
        )
    return rows.to_iterable_dataset(num_shards=min(len(rows), STREAM_SHARDS)) if streaming and len(rows) else rows


def _load_files(kind: str, folder: Path, files: list[Path], split: str, streaming: bool, **settings):
    """Files of one kind, without the others of their folder, in the splits that `datasets` sees in their names."""
    base, wanted = escape(str(folder.absolute())), {str(path.absolute()) for path in files}
    splits = {name: DataFilesList.from_patterns(patterns, base) for name, patterns in get_data_patterns(base).items()}
    found = {name: [escape(file) for file in listed if file in wanted] for name, listed in splits.items()}
    found = {name: own for name, own in found.items() if own}
    if not found:
        raise ValueError(f"no data; the folder holds {described(files_in(folder))}")
    return datasets.load_dataset(kind, data_files=found, split=split, streaming=streaming, **settings)


def told(dropped: Counter[str]) -> str:
    """`"3 rows without a caption"`."""
    return ", ".join(f"{count:,} row{'s' if count > 1 else ''} {reason}" for reason, count in dropped.items())
