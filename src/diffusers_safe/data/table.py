"""Where captions and pictures come from: a table of web addresses, or a folder of pictures."""

import glob
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetsError


LOADERS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}  # suffix -> builder of `datasets`
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an imagefolder
FILE_COLUMN = "file_name"  # of those files
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Row:
    """One picture before it is fetched.

    Attributes:
        address (`str`): On the web, or the name of a file in `folder`; `""` where there is none.
        caption (`str`): `""` where there is none.
        aesthetic (`float`, *optional*): Its score, a finite number.
        folder (`Path`, *optional*): Of a picture that is a file.
    """

    address: str
    caption: str
    aesthetic: float | None = None
    folder: Path | None = None


class Table:
    """The rows of a dataset as [`Row`]s.

    Args:
        dataset (`datasets.Dataset`): At least one row.
        address_column (`str`): Web addresses or, with `folder`, file names in it.
        caption_column (`str`): Captions.
        aesthetic_column (`str`, *optional*): Numbers; what is none counts as missing.
        folder (`Path`, *optional*): Where the files are.

    Raises:
        `ValueError`: If there is no row, or no such column, or a column that holds something else.
    """

    def __init__(
        self,
        dataset: Dataset,
        address_column: str,
        caption_column: str,
        aesthetic_column: str | None = None,
        folder: Path | None = None,
    ):
        if not len(dataset):
            raise ValueError("the table holds no rows")
        self.columns = (address_column, caption_column, *([aesthetic_column] if aesthetic_column else []))
        for column in self.columns:
            if column not in dataset.features:
                raise ValueError(f"no column '{column}', only {', '.join(dataset.features)}")
            if not isinstance(dataset.features[column], Value):
                raise ValueError(
                    f"column '{column}' holds {type(dataset.features[column]).__name__}, not plain values"
                )
        self.aesthetic_column = aesthetic_column
        self.folder = folder
        self._dataset = dataset.select_columns(list(dict.fromkeys(self.columns)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Row:
        return self._row(self._dataset[position])

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, self._dataset)

    def _row(self, values: dict) -> Row:
        address, caption, *score = (values[column] for column in self.columns)
        address, caption = ("" if value is None else str(value).strip() for value in (address, caption))
        return Row(address, caption, _number(*score), self.folder)

    @cached_property
    def digest(self) -> str:
        """A hash of all values, in their order. 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for batch in self._dataset.iter(10_000):
            digest.update(repr([batch[column] for column in self.columns]).encode())
        return digest.hexdigest()[:16]


def _number(value: object = None) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_table(
    source: str,
    url_column: str | None = None,
    caption_column: str = "text",
    aesthetic_column: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
) -> Table:
    """Reads captions and the places of pictures.

    Args:
        source (`str`): One of

            * a table: `.parquet`, `.csv`, `.jsonl` or `.json`, or a pattern of several such as `"part-*.parquet"`;
            * a folder of pictures with a `metadata.csv`, `.jsonl` or `.parquet` that has a column `file_name`, or
              with a `.txt` file beside each picture;
            * a dataset on the Hugging Face Hub.
        url_column (`str`, *optional*): Of a table or dataset: web addresses. `"url"` by default.
        caption_column (`str`, defaults to `"text"`): Captions; a `.txt` file's text has this name.
        aesthetic_column (`str`, *optional*): Scores.
        config_name (`str`, *optional*): Of a dataset on the Hub.
        split (`str`, *optional*): Of a table or dataset, `"train"` by default; `"train[:1000]"` are its first thousand
            rows.

    Raises:
        `ValueError`: If there is nothing to read there, or not these columns, or an option does not fit the source.
    """
    folder = Path(source) if Path(source).is_dir() else None
    loader = LOADERS.get(Path(source).suffix.lower())
    for name, value in (("url_column", url_column), ("split", split), ("dataset_config_name", config_name)):
        if value is not None and (folder or (loader and name == "dataset_config_name")):
            raise ValueError(f"{name} '{value}': means nothing for {source}, a {'folder' if folder else 'file'}")
    try:
        if folder:
            return Table(_folder(folder, caption_column), FILE_COLUMN, caption_column, aesthetic_column, folder)
        split = split or "train"
        dataset = _files(source, loader, split) if loader else load_dataset(source, config_name, split=split)
        return Table(dataset, url_column or "url", caption_column, aesthetic_column)
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ValueError(f"source {source}: {reason}") from None


def _files(source: str, loader: str, split: str) -> Dataset:
    files = [source] if Path(source).is_file() else sorted(glob.glob(source))
    if not files:
        raise ValueError("no such file")
    return load_dataset(loader, data_files=[glob.escape(file) for file in files], split=split)


def _folder(folder: Path, caption_column: str) -> Dataset:
    for name in METADATA:
        if (path := folder / name).is_file():
            return _files(str(path), LOADERS[path.suffix], "train")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    captions = [_text(path.with_suffix(".txt")) for path in pictures]
    if not any(captions):
        raise ValueError(
            f"{len(pictures)} pictures, and neither {' nor '.join(METADATA)} nor .txt files with captions"
        )
    names = [path.relative_to(folder).as_posix() for path in pictures]
    return Dataset.from_dict({FILE_COLUMN: names, caption_column: captions})


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace").strip() if path.is_file() else ""
