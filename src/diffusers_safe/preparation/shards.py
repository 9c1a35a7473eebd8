"""Writers for shards: tar files for WebDataset, or parquet files. The same samples give the same bytes."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value

from .pictures import Picture
from .table import Row


ROW_GROUP = 100  # samples per row group, as `datasets` writes images
COLUMNS = {
    "image": Image(),
    "text": Value("string"),
    "url": Value("string"),
    "file_name": Value("string"),
    **{name: Value("int32") for name in ("width", "height", "original_width", "original_height")},
    "sha256": Value("string"),
    "aesthetic": Value("float64"),
}


class WebDatasetShard:
    """A tar file with `NNNNNN.jpg`, `.txt` (the caption) and `.json` ([`fields`]) of each sample.

    Args:
        path (`Path`): The file; an existing one is overwritten.
    """

    suffix = ".tar"

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, key: str, row: Row, picture: Picture) -> None:
        about = json.dumps(fields(row, picture), ensure_ascii=False).encode()
        for suffix, content in (("jpg", picture.jpeg), ("txt", row.caption.encode()), ("json", about)):
            member = tarfile.TarInfo(f"{key}.{suffix}")  # owner and time are 0
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self._tar.close()
        _close(self._file)


class ParquetShard:
    """A parquet file with the columns `image` (the JPEG, a `datasets.Image`), `text` and those of [`fields`].

    Args:
        path (`Path`): The file; an existing one is overwritten.
    """

    suffix = ".parquet"

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._writer = None
        self._samples = []

    def add(self, key: str, row: Row, picture: Picture) -> None:
        image = {"bytes": picture.jpeg, "path": f"{key}.jpg"}
        self._samples.append({"image": image, "text": row.caption, **fields(row, picture)})
        if len(self._samples) == ROW_GROUP:
            self._write()

    def close(self) -> None:
        if self._samples:
            self._write()
        self._writer.close()
        _close(self._file)

    def _write(self) -> None:
        if self._writer is None:
            columns = {name: COLUMNS[name] for name in self._samples[0]}
            self._writer = pq.ParquetWriter(self._file, Features(columns).arrow_schema)
        self._writer.write_table(pa.Table.from_pylist(self._samples, self._writer.schema))
        self._samples = []


FORMATS = {"webdataset": WebDatasetShard, "parquet": ParquetShard}


def fields(row: Row, picture: Picture) -> dict[str, str | int | float]:
    """The fields of a sample besides image and caption: `url` (`file_name` for folders), `width`, `height`,
    `original_width`, `original_height` in pixels, `sha256` of the original bytes, and `aesthetic` if there is a
    score."""
    width, height = picture.size
    original_width, original_height = picture.original_size
    return {
        "url" if row.folder is None else "file_name": row.address,
        "width": width,
        "height": height,
        "original_width": original_width,
        "original_height": original_height,
        "sha256": picture.sha256,
        **({} if row.aesthetic is None else {"aesthetic": row.aesthetic}),
    }


def _close(file: io.BufferedWriter) -> None:
    """Writes a file to disk and closes it, so that a finished shard survives a power failure."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
