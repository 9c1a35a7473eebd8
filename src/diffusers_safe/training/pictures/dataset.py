"""Rows of a dataset as pairs of an undecoded image and its captions. Unusable data is reported before training."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from ...concepts import naming_pattern
from ...diffusion.generators import sample_generator
from ...preparation.folders import Boundary


# Default columns, in this order: of `datasets`, of WebDataset, of the parquet files of img2dataset.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "txt", "caption")
FINGERPRINT_BYTES = 4096  # at the end of an image file
NO_CAPTION = "without a caption"
FORBIDDEN = "with a caption that names a forbidden concept"


class NoColumnError(ValueError):
    """Raised if a column is missing."""


class CaptionedImages:
    """The rows of a dataset as pairs of an undecoded image and its captions. Use [`open_dataset`] to create it.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): All rows of the source.
        image_column (`str`, *optional*): Column of images: files, their bytes, or paths. By default the first of
            `IMAGE_COLUMNS` that exists.
        caption_column (`str`, *optional*): Column with a caption or a list of captions per row. `"json.caption"` is a
            field of the column `json`. By default the first of `CAPTION_COLUMNS` that exists.
        forbidden_concepts (`list[str]`, defaults to `()`): Rows are dropped if any of their captions names one of
            these concepts.
        max_train_samples (`int`, *optional*): Maximum number of rows. They are chosen at random; for a stream, the
            first rows are used.
        seed (`int`, defaults to 0): Seed of this choice.
        boundary ([`Boundary`], *optional*): The folders from which image files may be read.

    Attributes:
        indices (`np.ndarray`, *optional*): Indices of the used rows in ascending order; `None` for a stream, whose
            rows are only checked when they are read.
        dropped (`Counter[str]`): Number of dropped rows by reason.

    Raises:
        `ValueError`: If a column is missing or has another type, or no row is left.
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
        columns = rows.column_names or list(_first(rows))  # streams may have no column names
        self.image_column = image_column or _first_of(IMAGE_COLUMNS, columns)
        self.caption_path = (caption_column or _first_of(CAPTION_COLUMNS, columns)).split(".")
        self.forbidden_concepts = list(forbidden_concepts)
        self.boundary = boundary
        self.dropped: Counter[str] = Counter()
        self._check_columns(columns)
        self.rows = self._undecoded(rows)
        self.indices = None
        if self.streaming:
            self.captions_of(_first(self.rows))  # so that a missing field is reported now
            self.rows = self.rows if max_train_samples is None else self.rows.take(max_train_samples)
        else:
            self._captions = self.rows.select_columns([self.caption_path[0]])
            self._check_files()
            self.indices = self._usable_rows(max_train_samples, seed)

    def _check_columns(self, columns: list[str]) -> None:
        for option, column in (("image_column", self.image_column), ("caption_column", self.caption_path[0])):
            if column not in columns:
                raise NoColumnError(f"{option} '{column}': no such column; there are {', '.join(columns)}")
        if self.image_column == self.caption_path[0]:
            raise ValueError(f"caption_column '{self.image_column}': is also the image_column")

    def _undecoded(self, rows: datasets.Dataset | datasets.IterableDataset):
        rows = rows.select_columns([self.image_column, self.caption_path[0]])
        if rows.features is None:
            return rows
        try:
            return rows.cast_column(self.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, pa.ArrowException):
            kind = rows.features[self.image_column]
            raise ValueError(f"image_column '{self.image_column}': must contain images, not {kind}") from None

    def _check_files(self) -> None:
        """Checks that all image files lie inside of the boundary."""
        if self.boundary is None or self.rows.features is None:
            return
        for table in self.rows.with_format("arrow").select_columns([self.image_column]).iter(batch_size=10_000):
            for chunk in table[self.image_column].chunks:
                data, paths = chunk.field("bytes"), chunk.field("path")
                self.boundary.check(paths.filter(data.is_null()).drop_null().to_pylist())

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
            raise ValueError(f"no row of the dataset is left; dropped: {describe_dropped(self.dropped)}")
        if max_train_samples is not None and max_train_samples < len(usable):
            order = torch.randperm(len(usable), generator=sample_generator(seed, "max_train_samples", 0))
            usable = sorted(usable[place] for place in order[:max_train_samples].tolist())
        return np.array(usable)

    def _captions_of_all_rows(self) -> Iterator[list[str]]:
        for batch in self._captions.iter(batch_size=1000):
            for value in batch[self.caption_path[0]]:
                yield self.captions_of({self.caption_path[0]: value})

    def captions_of(self, row: dict[str, Any]) -> list[str]:
        """The captions of a row, without blank ones."""
        value = row
        for name in self.caption_path:
            if value is not None and (not isinstance(value, dict) or name not in value):
                fields = f"; there are {', '.join(value)}" if isinstance(value, dict) else ""
                raise ValueError(f"caption_column '{'.'.join(self.caption_path)}': no field '{name}'{fields}")
            value = None if value is None else value[name]
        captions = value if isinstance(value, list) else [value]
        for caption in captions:
            if caption is not None and not isinstance(caption, str):
                raise ValueError(
                    f"caption_column '{'.'.join(self.caption_path)}': must contain texts or lists of texts, not "
                    f"{type(caption).__name__}"
                )
        return [caption for caption in captions if caption and caption.strip()]

    def reason_to_drop(self, captions: list[str]) -> str | None:
        """The reason to drop a row with these captions, or `None`."""
        if not captions:
            return NO_CAPTION
        if not self.forbidden_concepts:
            return None
        pattern = naming_pattern(tuple(self.forbidden_concepts))
        return FORBIDDEN if any(map(pattern.search, captions)) else None

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, place: int) -> dict[str, Any]:
        """The used row at this position."""
        return self.rows[int(self.indices[place])]

    def image_of(self, row: dict[str, Any]) -> Any:
        """The undecoded image of a row.

        Raises:
            `ValueError`: If the image is a file outside of the boundary.
        """
        image = row[self.image_column]
        if self.boundary is not None and isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
            self.boundary.check([image["path"]])
        return image

    def file_name_of(self, row: dict[str, Any]) -> str | None:
        """The file name of the image of a row, if it has one."""
        image = self.image_of(row)
        return Path(image["path"]).name if isinstance(image, dict) and image.get("path") else None

    def name(self, place: int) -> str:
        """The name of the used row at this position, for messages."""
        file_name = self.file_name_of(self.row(place))
        return f"row {self.indices[place]}" + (f", {file_name}" if file_name else "")

    def captions(self, place: int) -> list[str]:
        """The captions of the used row at this position, at least one. The image is not read."""
        return self.captions_of(self._captions[int(self.indices[place])])

    def all_captions(self) -> Iterator[list[str]]:
        """The captions of all used rows, in order."""
        used = set(self.indices.tolist())
        return (captions for index, captions in enumerate(self._captions_of_all_rows()) if index in used)

    def fingerprint(self) -> str:
        """A hash of the captions and images of all used rows, 16 hexadecimal digits. It does not depend on where the
        dataset lies or how it was loaded.

        Of each image, the size of the file and its last 4 kB are used, which depend on the whole image for PNG and
        JPEG.
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
    """The size and the last bytes of an image file, without copying the rest."""
    stored, path = (image["bytes"], image["path"].as_py()) if image.is_valid else (pa.scalar(None), None)
    if stored.is_valid:
        data = stored.as_buffer()
        return len(data).to_bytes(8, "big") + bytes(memoryview(data)[-FINGERPRINT_BYTES:])
    if path is None or not os.path.isfile(path):
        return f"no file {path}".encode()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        return size.to_bytes(8, "big") + file.read()


def describe_dropped(dropped: Counter[str]) -> str:
    """The numbers of dropped rows for a message: `"3 rows without a caption"`."""
    return ", ".join(f"{count:,} row{'s' if count > 1 else ''} {reason}" for reason, count in dropped.items())
