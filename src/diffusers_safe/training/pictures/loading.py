"""Opens datasets of captioned images: folders, files and the Hub."""

import os
from collections.abc import Iterable
from glob import escape, glob
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets.data_files import DataFilesList, get_data_patterns

from ...preparation.folders import (
    METADATA,
    Boundary,
    captioned_pictures,
    check_files,
    described,
    files_in,
    is_empty_tar,
)
from ...preparation.table import NO_DATA, metadata_of
from .dataset import CaptionedImages, NoColumnError


# Extension of data files -> builder of `datasets`. Images in folders need none.
BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
}
STREAM_SHARDS = 64  # of a dataset in memory that is read as a stream


class DataError(ValueError):
    """Raised if training data cannot be used, before the training starts."""

    exit_code = 2


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
    """Opens a dataset of captioned images. Exactly one of the first three arguments must be given.

    Args:
        dataset_name (`str`, *optional*): Id of a dataset on the Hub.
        train_data_dir (`str`, *optional*): Folder of images with a `metadata.jsonl`, `.csv` or `.parquet`, or with a
            `.txt` file next to each (both only have the split `"train"`); of parquet files; of WebDataset tar files;
            or the output of `Dataset.save_to_disk` or `img2dataset`. Files outside of the folder are not read.
        data_files (`list[str]`, *optional*): Paths, patterns or URLs of parquet, arrow, tar, csv or json files.
        dataset_config_name (`str`, *optional*): Configuration of the dataset; with `dataset_name` only.
        split (`str`, defaults to `"train"`): Split of the dataset.
        streaming (`bool`, defaults to `False`): Read the dataset during training, without a copy on disk.
        cache_dir (`str`, *optional*): Cache folder of `datasets`.

    The other arguments are those of [`CaptionedImages`].

    Raises:
        `DataError`: A `ValueError`: if not exactly one source is given, it cannot be opened, a column is missing, no
            row is left, or a file lies outside of the folder.
    """
    sources = {"dataset_name": dataset_name, "train_data_dir": train_data_dir, "data_files": data_files}
    given = {name: value for name, value in sources.items() if value}
    if len(given) != 1:
        raise DataError(f"{', '.join(given or sources)}: give exactly one of {', '.join(sources)}")
    ((option, source),) = given.items()
    load = {"dataset_name": _load_dataset, "train_data_dir": _load_folder, "data_files": _load_data_files}[option]
    settings = {"name": dataset_config_name, "split": split, "streaming": streaming, "cache_dir": cache_dir}
    try:
        if option != "dataset_name" and dataset_config_name is not None:
            raise ValueError(
                f"dataset_config_name '{dataset_config_name}': does not apply to {option}, only to dataset_name"
            )
        rows = load(source, **settings)
        boundary = _boundary(option, source, cache_dir)
        return CaptionedImages(
            rows, image_column, caption_column, forbidden_concepts, max_train_samples, seed, boundary
        )
    except Exception as error:  # readers of damaged files raise any exception: an empty tar file an IndexError
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # the cause says what is wrong
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, NoColumnError) and option != "data_files" and os.path.isdir(source):
            reason += f"; the folder contains {described(files_in(Path(source)))}"
        if NO_DATA in reason:
            reason = "has no rows"
        if not isinstance(error, (OSError, ValueError)):
            reason = f"cannot be opened ({type(error).__name__}{reason and f': {reason}'})"
        raise DataError(f"{option} {source}: {reason}") from error


def _boundary(option: str, source: Any, cache_dir: str | None) -> Boundary | None:
    """The places from which image files may be read: the folder, the Hub, and the cache of `datasets`. Data files are
    named one by one, so their paths are trusted."""
    if option == "data_files":
        return None
    caches = [cache_dir or datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    if os.path.isdir(source):
        return Boundary(source, *caches)
    hub = ("hf://", datasets.config.HF_ENDPOINT.rstrip("/") + "/")
    return Boundary(*caches, huggingface_hub.constants.HF_HUB_CACHE, remote=hub)


def _load_dataset(source: str, **settings):
    if os.path.isdir(source):
        check_files(files_in(Path(source)))  # `files_in` also checks links
    return datasets.load_dataset(source, **settings)


def _load_data_files(source: list[str], split: str, **settings):
    kinds = {BUILDERS.get(Path(file).suffix.lower()) for file in source}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"files of one kind are needed; kinds are {', '.join(BUILDERS)}")
    if missing := [file for file in source if "://" not in file and not glob(file, recursive=True)]:
        raise ValueError(f"{missing[0]}: no such file")
    check_files(path for file in source for path in glob(file, recursive=True) if os.path.isfile(path))
    return datasets.load_dataset(kinds.pop(), data_files={split: list(source)}, split=split, **settings)


def _load_folder(source: str, split: str, streaming: bool, **settings):
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError("no such folder")
    files = files_in(folder)
    kinds = {path.suffix.lower() for path in files}
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(source)
        if split not in splits:
            raise ValueError(f"no split '{split}'; there are {', '.join(splits)}")
        return _as_stream(splits[split], streaming)
    if (folder / "state.json").is_file():
        return _as_stream(datasets.load_from_disk(source), streaming)
    settings |= {"split": split, "streaming": streaming}
    if any((folder / name).is_file() for name in METADATA):
        check_files(path for path in files if path.name in METADATA)
        if streaming:
            metadata_of(folder)  # so that files outside of the folder are reported now
        # One pattern, as in diffusers' examples: otherwise `datasets` lists the files 66 times to find splits.
        return datasets.load_dataset("imagefolder", data_files={"train": f"{escape(str(folder))}/**"}, **settings)
    if ".tar" in kinds:
        tars = [path for path in files if path.suffix.lower() == ".tar" and not is_empty_tar(path)]
        return _load_files("webdataset", folder, tars, **settings)
    if found := captioned_pictures(files):
        if split != "train":
            raise ValueError(f"no split '{split}'; images with .txt files are the split train")
        columns = {"image": list(map(str, found[0])), "text": found[1]}
        return _as_stream(datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()), streaming)
    if {".parquet"} < kinds.intersection(BUILDERS) and not any(path.name in METADATA for path in files):
        # `datasets` might choose the other files.
        tables = [path for path in files if path.suffix.lower() == ".parquet"]
        check_files(tables)
        return _load_files("parquet", folder, tables, **settings)
    if kinds.intersection((*BUILDERS, ".zip")):
        check_files(files)
        return datasets.load_dataset(source, **settings)
    raise ValueError(
        f"no images with captions ({', '.join(METADATA)}, or a .txt file next to each), no tar files and no"
        f" parquet files; the folder contains {described(files)}"
    )


def _as_stream(rows: datasets.Dataset, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    return rows.to_iterable_dataset(num_shards=min(len(rows), STREAM_SHARDS)) if streaming and len(rows) else rows


def _load_files(kind: str, folder: Path, files: list[Path], **settings):
    """Loads files of one kind from a folder that has other files as well, with the splits that `datasets` derives from
    their names."""
    base, wanted = escape(str(folder.absolute())), {str(path.absolute()) for path in files}
    splits = {name: DataFilesList.from_patterns(patterns, base) for name, patterns in get_data_patterns(base).items()}
    found = {name: [escape(file) for file in listed if file in wanted] for name, listed in splits.items()}
    found = {name: listed for name, listed in found.items() if listed}
    if not found:
        raise ValueError(f"no data; the folder contains {described(files_in(folder))}")
    return datasets.load_dataset(kind, data_files=found, **settings)
