"""Tables of captions and places of images: from a table of URLs, a folder of images, or tar files."""

import glob
import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from .folders import METADATA, Boundary, captioned_pictures, check_files, described, files_in, tar_samples


NO_DATA = "corresponds to no data"  # what `datasets` says of tables without rows
LOADERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "json",
    ".json": "json",
}  # extension -> builder of `datasets`
FILE_COLUMN = "file_name"  # in the files of `METADATA`
PLACE_COLUMN = "place"  # offset and size of an image in a tar file
_FAILED = "An error occurred while generating the dataset"  # of `datasets`, above the reason
for _kind in set(LOADERS.values()):  # they also log the reason of the error that they raise
    logging.getLogger(f"datasets.packaged_modules.{_kind}.{_kind}").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Row:
    """A row of a table: one image before it is loaded.

    Attributes:
        address (`str`): URL, or the name of a file in `folder`; for an image in a tar file
            `"00000.tar/000000000.jpg"`. `""` if missing.
        caption (`str`): Caption; `""` if missing.
        aesthetic (`float`, *optional*): Aesthetic score, a finite number.
        folder (`Path`, *optional*): Folder of the file or tar file; `None` for URLs.
        place (`tuple[int, int]`, *optional*): Offset and size in the tar file.
    """

    address: str
    caption: str
    aesthetic: float | None = None
    folder: Path | None = None
    place: tuple[int, int] | None = None


class Table:
    """The rows of a dataset as [`Row`]s.

    Args:
        dataset (`datasets.Dataset`): The rows, at least one.
        address_column (`str`): Column of URLs or, with `folder`, of file names.
        caption_column (`str`): Column of captions.
        aesthetic_column (`str`, *optional*): Column of scores. Values that are not numbers count as missing.
        folder (`Path`, *optional*): Folder of the files.

    Raises:
        `ValueError`: If there are no rows, or a column is missing or does not contain plain values.
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
            raise ValueError("the table has no rows")
        self.columns = (address_column, caption_column, *([aesthetic_column] if aesthetic_column else []))
        if twice := [column for column in self.columns if self.columns.count(column) > 1]:
            raise ValueError(f"column '{twice[0]}': is named for two different things")
        for column in self.columns:
            if column not in dataset.features:
                raise ValueError(f"no column '{column}', only {', '.join(dataset.features)}")
            if not isinstance(dataset.features[column], Value):
                raise ValueError(
                    f"column '{column}' contains {type(dataset.features[column]).__name__}, not plain values"
                )
        self.aesthetic_column = aesthetic_column
        self.folder = folder
        places = [PLACE_COLUMN] if folder is not None and PLACE_COLUMN in dataset.features else []
        self._dataset = dataset.select_columns(list(dict.fromkeys([*self.columns, *places])))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Row:
        return self._row(self._dataset[position])

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, self._dataset)

    def _row(self, values: dict) -> Row:
        address, caption, *score = (values[column] for column in self.columns)
        address, caption = ("" if value is None else str(value).strip() for value in (address, caption))
        place = values.get(PLACE_COLUMN) if self.folder is not None else None
        return Row(address, caption, _number(*score), self.folder, place and tuple(place))

    @cached_property
    def digest(self) -> str:
        """A hash of all values in their order, 16 hexadecimal digits."""
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
    caption_column: str | None = None,
    aesthetic_column: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
) -> Table:
    """Reads the captions, and the URLs or file names, of images from any supported source.

    Args:
        source (`str`): One of

            * a table: `.parquet`, `.csv`, `.jsonl` or `.json`, or a pattern of several such as `"part-*.parquet"`;
            * a folder of images with a `metadata.csv`, `.jsonl` or `.parquet` that has a column `file_name`, or
              with a `.txt` file next to each image;
            * a folder of WebDataset tar files, such as `img2dataset` writes;
            * a dataset on the Hugging Face Hub.
        url_column (`str`, *optional*): Column of URLs of a table or dataset, `"url"` by default.
        caption_column (`str`, *optional*): Column of captions, `"text"` by default. For tar files a field of the
            `.json` of each sample, by default the text of its `.txt`.
        aesthetic_column (`str`, *optional*): Column of scores; for tar files a field of the `.json`.
        config_name (`str`, *optional*): Configuration of a dataset on the Hub.
        split (`str`, *optional*): Split of a table or dataset, `"train"` by default. `"train[:1000]"` takes the first
            thousand rows.

    Raises:
        `ValueError`: If the source cannot be read, a column is missing, an option does not apply to the source, or a
            file lies outside of the folder.
    """
    if not source.strip():
        raise ValueError(f"source '{source}': is empty; give a table, a folder or a dataset on the Hub")
    folder = Path(source) if Path(source).is_dir() else None
    loader = LOADERS.get(Path(source).suffix.lower())
    for name, value in (("url_column", url_column), ("split", split), ("dataset_config_name", config_name)):
        if value is not None and (folder or (loader and name == "dataset_config_name")):
            raise ValueError(f"{name} '{value}': does not apply to {source}, a {'folder' if folder else 'file'}")
    try:
        if not folder and not loader and Path(source).exists():
            raise ValueError(f"must be a folder or a file that ends in {', '.join(LOADERS)}")
        if folder:
            rows, caption_column = _folder(folder, caption_column, aesthetic_column)
            return Table(rows, FILE_COLUMN, caption_column, aesthetic_column, folder)
        split = split or "train"
        dataset = _files(source, loader, split) if loader else load_dataset(source, config_name, split=split)
        return Table(dataset, url_column or "url", caption_column or "text", aesthetic_column)
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        lines = [line for line in str(cause).splitlines() if line.strip() and line != _FAILED]
        raise ValueError(f"source {source}: {lines[0] if lines else type(cause).__name__}") from None


def _files(source: str, loader: str, split: str) -> Dataset:
    files = [source] if Path(source).is_file() else sorted(glob.glob(source))
    if not files:
        raise ValueError("no such file")
    check_files(files)
    try:
        return load_dataset(loader, data_files=[glob.escape(file) for file in files], split=split)
    except ValueError as error:
        if NO_DATA in str(error):
            raise ValueError(f"{source}: has no rows") from None
        raise


def _folder(folder: Path, caption_column: str | None, aesthetic_column: str | None) -> tuple[Dataset, str]:
    """The rows of a folder, and the name of the caption column."""
    files = files_in(folder)
    if (rows := metadata_of(folder)) is not None:
        return rows, caption_column or "text"
    if tars := [path for path in files if path.suffix.lower() == ".tar"]:
        return _tars(folder, tars, caption_column, aesthetic_column)
    if found := captioned_pictures(files):
        names, caption_column = [path.relative_to(folder).as_posix() for path in found[0]], caption_column or "text"
        return Dataset.from_dict({FILE_COLUMN: names, caption_column: found[1]}), caption_column
    raise ValueError(
        f"neither {', '.join(METADATA)}, nor a .txt file next to an image, nor tar files; the folder contains"
        f" {described(files)}"
    )


def metadata_of(folder: Path) -> Dataset | None:
    """The rows of the metadata file of a folder, or `None` if there is none.

    Raises:
        `ValueError`: If an image lies outside of the folder.
    """
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{found[0].name} and {found[1].name}: only one of them can be read; remove the other")
    path = found[0]
    rows = _files(str(path), LOADERS[path.suffix], "train")
    if FILE_COLUMN in rows.features:
        Boundary(folder).check(folder / str(name).strip() for name in rows[FILE_COLUMN] if name is not None)
    return rows


def _tars(
    folder: Path, tars: list[Path], caption_column: str | None, aesthetic_column: str | None
) -> tuple[Dataset, str]:
    caption_column = caption_column or "txt"
    columns = [caption_column, *([aesthetic_column] if aesthetic_column else [])]
    rows: dict[str, list] = {name: [] for name in (FILE_COLUMN, PLACE_COLUMN, *columns)}
    fields = {}
    for path in tars:
        for sample in tar_samples(path):
            rows[FILE_COLUMN].append(f"{path.relative_to(folder).as_posix()}/{sample.member}")
            rows[PLACE_COLUMN].append([sample.offset, sample.size])
            for name in columns:
                value = sample.fields.get(name)
                rows[name].append(None if value is None else str(value))
            fields |= dict.fromkeys(sample.fields)
    if not rows[FILE_COLUMN]:
        raise ValueError(f"no images in {len(tars)} tar files, such as {tars[0].name}")
    if missing := [name for name in columns if name not in fields]:
        raise ValueError(f"no column '{missing[0]}', only {', '.join(fields) or 'images'}, in the tar files")
    return Dataset.from_dict(rows), caption_column
