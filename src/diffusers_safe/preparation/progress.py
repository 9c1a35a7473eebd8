"""The progress of a preparation on disk, so that a stopped run can continue.

While a preparation runs, its output folder contains a folder `.preparation/` with

* `settings.json`: everything that determines the content of the shards;
* `00000.json`, ...: the progress after each finished shard;
* `train-00001.tar`: the shard that is being written.

A shard is finished as soon as its record exists; it is then moved to the output folder. When all shards are finished,
`report.json` is written to the output folder and `.preparation/` is deleted.
"""

import json
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from ..output_folders import LOCK, RECORD, OutputFolderError, make_way, record_written
from .shards import FORMATS


REPORT = "report.json"
STATE = ".preparation"
SETTINGS = "settings.json"  # in STATE
_OWN_NAMES = re.compile(r"train-\d{5,}\.\w+|\d{5,}\.json|settings\.json|\.(settings|\d{5,})\.json\.partial")
_ADVICE = "give an empty or a new folder, or --overwrite to replace them"


@dataclass
class Progress:
    """The progress of a preparation after a finished shard.

    Attributes:
        candidates (`int`): Number of candidates that were processed, kept or dropped.
        kept (`int`): Number of samples in shards.
        shards (`int`): Number of finished shards.
        dropped (`Counter`): Number of dropped candidates by reason.
        changed (`Counter`): Number of kept images by change.
        examples (`dict[str, str]`): The first dropped image of each reason.
        hashes (`set[str]`): SHA-256 of the kept images.
    """

    candidates: int = 0
    kept: int = 0
    shards: int = 0
    dropped: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)

    def drop(self, reason: str, address: str) -> None:
        """Counts a candidate as dropped."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, address)

    def finish_shard(self, folder: Path, name: str, hashes: list[str]) -> None:
        """Writes the record of a finished shard and moves the shard to the output folder."""
        record = {name: getattr(self, name) for name in ("candidates", "kept", "dropped", "changed", "examples")}
        write_text(_record_path(folder, self.shards), json.dumps({**record, "hashes": hashes}))
        move_shard(folder, name)
        self.shards += 1


def shard_name(number: int, format: str) -> str:
    """The file name of a shard. `datasets` reads files of this name, and no others, as the split "train"."""
    return f"train-{number:05}{FORMATS[format].suffix}"


def move_shard(folder: Path, name: str) -> None:
    """Moves a finished shard from `STATE` to the output folder."""
    made = (folder / STATE / name).stat()
    make_way(folder, [name])
    record_written(folder, states={name: [made.st_size, made.st_mtime_ns]})
    os.replace(folder / STATE / name, folder / name)


def check_state(folder: Path) -> None:
    """Checks that the files of a preparation can be written to a folder.

    Raises:
        `ValueError`: If `STATE` is not a folder, or the name of another file belongs to a folder.
    """
    state = folder / STATE
    if state.is_symlink() or (state.exists() and not state.is_dir()):
        kind = "a link" if state.is_symlink() else "a file"
        raise OutputFolderError(f"output_dir {folder}: {STATE} is {kind}, not a folder; remove it, or give another")
    for path in folder.glob("*"):
        if (path.name == REPORT or _OWN_NAMES.fullmatch(path.name)) and path.is_dir():
            raise OutputFolderError(f"output_dir {folder}: {path.name} is a folder; remove it, or give another")


def check_folder(folder: Path, settings: dict[str, Any], rows: int) -> dict[str, Any] | None:
    """Checks that a preparation can start or continue in a folder.

    Args:
        folder (`Path`): The output folder, which may not exist.
        settings (`dict`): From [`settings_record`].
        rows (`int`): Number of rows of the table.

    Returns:
        `dict`: The report, if this preparation is finished; otherwise `None`.

    Raises:
        `ValueError`: If the folder contains anything else, or the files of this preparation are damaged.
    """
    path = next((path for path in (folder / REPORT, folder / STATE / SETTINGS) if path.is_file()), None)
    if path is None:
        if found := [item.name for item in folder.glob("*") if item.name not in (STATE, LOCK, RECORD)]:
            raise OutputFolderError(f"output_dir {folder}: holds something else ({min(found)}); {_ADVICE}")
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        earlier = known["settings"] if path.name == REPORT else known
        different = [name for name in {**settings, **earlier} if earlier.get(name) != settings.get(name)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise OutputFolderError(
            f"output_dir {folder}: {path.name} was not written by prepare-data; {_ADVICE}"
        ) from None
    if different:
        name = different[0]
        difference = f"{name} {earlier.get(name)!s:.200}, not {settings.get(name)!s:.200}"
        raise OutputFolderError(f"output_dir {folder}: holds another preparation ({difference}); {_ADVICE}")
    if path.name == SETTINGS:
        read_progress(folder, settings, rows)
        return None
    if not _is_report(known, rows, settings["shard_size"]):
        raise OutputFolderError(f"output_dir {folder}: {REPORT} is damaged; {_ADVICE}")
    for name in (shard_name(number, settings["format"]) for number in range(known["shards"])):
        if not (folder / name).is_file():
            raise OutputFolderError(f"output_dir {folder}: {name} was finished and is missing; {_ADVICE}")
    return known


def read_progress(folder: Path, settings: dict[str, Any], candidates: int) -> Progress:
    """Reads the records of the finished shards.

    Args:
        folder (`Path`): The output folder.
        settings (`dict`): From [`settings_record`].
        candidates (`int`): The largest possible number of candidates.

    Raises:
        `ValueError`: If a record is damaged, or its shard is missing.
    """
    progress = Progress()
    while (path := _record_path(folder, progress.shards)).is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record, progress, settings["shard_size"], candidates):
            raise OutputFolderError(f"{path}: broken record; delete it to prepare its shard again")
        name = shard_name(progress.shards, settings["format"])
        if not any((place / name).is_file() for place in (folder / STATE, folder)):
            raise OutputFolderError(
                f"output_dir {folder}: {name} was finished and is missing; delete {path} to prepare it again"
            )
        progress = Progress(
            record["candidates"],
            record["kept"],
            progress.shards + 1,
            Counter(record["dropped"]),
            Counter(record["changed"]),
            record.get("examples", {}),
            progress.hashes.union(record["hashes"]),
        )
    return progress


def discard(folder: Path) -> None:
    """Deletes the files of another preparation; other files with their names are moved away."""
    clear_state(folder)
    make_way(folder, [REPORT, *(path.name for path in folder.glob("train-*"))])


def clear_state(folder: Path) -> None:
    """Deletes the files of `STATE`, the settings first, and the folder itself if it is then empty."""
    state = folder / STATE
    for path in sorted(state.glob("*"), key=lambda path: path.name != SETTINGS):
        if _OWN_NAMES.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()
    with suppress(OSError):
        state.rmdir()


def _record_path(folder: Path, shard: int) -> Path:
    return folder / STATE / f"{shard:05}.json"


def _is_report(report: dict, rows: int, shard_size: int) -> bool:
    kept, dropped, shards = (report.get(name) for name in ("kept", "dropped", "shards"))
    return (
        all(map(_is_count, (report.get("rows"), kept, shards)))
        and _are_counts(dropped, report.get("changed"))
        and _are_texts(report.get("examples", {}))
        and report["rows"] == rows == kept + sum(dropped.values())
        and shards == -(-kept // shard_size) > 0
    )


def _is_record(record: Any, before: Progress, shard_size: int, most_candidates: int) -> bool:
    """Whether this can be the record of the shard that follows the progress `before`."""
    if not isinstance(record, dict):
        return False
    candidates, kept, dropped, hashes = (record.get(name) for name in ("candidates", "kept", "dropped", "hashes"))
    return (
        _is_count(candidates)
        and _is_count(kept)
        and _are_counts(dropped, record.get("changed"))
        and _are_texts(record.get("examples", {}))
        and isinstance(hashes, list)
        and all(isinstance(digest, str) for digest in hashes)
        and 1 <= len(hashes) == len(set(hashes)) == kept - before.kept <= shard_size
        and before.hashes.isdisjoint(hashes)
        and kept + sum(dropped.values()) == candidates <= most_candidates
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(*values: Any) -> bool:
    return all(isinstance(value, dict) and all(map(_is_count, value.values())) for value in values)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
