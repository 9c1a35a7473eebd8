"""Fills shards from a table: what passes the filters, in the order of the table, each picture once.

The output folder holds `train-00000.tar` (or `.parquet`), ... and, when all is done, `report.json`. Until then there
is `.preparation/`: the settings, the shard that is being written, and a record of each finished one. A shard counts
from the moment its record is there; a run that was killed goes on behind the last record, and comes to the same files.
"""

import asyncio
import json
import os
import re
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..arguments import choose, typed
from ..output_folders import LOCK, RECORD, OutputFolderError, claimed, make_way, record_written, write_own
from ..provenance import write_text
from .downloads import UNREACHABLE, DownloadSettings, Fetcher
from .filters import ROW_RULES, Dropped, Filters, reason_to_drop
from .pictures import Picture, read_picture
from .shards import FORMATS
from .table import Row, Table


REPORT = "report.json"
_ADVICE = "give an empty or a new folder, or --overwrite to replace them"
STATE = ".preparation"
SETTINGS = "settings.json"  # in that folder
_OWN = re.compile(r"train-\d{5,}\.\w+|\d{5,}\.json|settings\.json|\.(settings|\d{5,})\.json\.partial")  # names there
SAME_ADDRESS, SAME_PICTURE = "same address as before", "same picture as before"
AHEAD = 32  # pictures under way or waiting for an earlier one, times `concurrency`
MAX_DEAD_HOSTS = 50  # different servers in a row that cannot be reached: it is the network


@typed
@dataclass(frozen=True)
class PreparationSettings:
    """What decides the content of the shards, with the table.

    Attributes:
        filters ([`Filters`]): What stays.
        format (`str`, defaults to `"webdataset"`): One of `FORMATS`.
        shard_size (`int`, defaults to 1000): Samples of a shard; the last has what is left.
        resize (`int`, *optional*): Pixels of the shorter side; larger pictures are shrunk to it, none is enlarged.
        jpeg_quality (`int`, defaults to 95): 1 to 95.
    """

    filters: Filters = Filters()
    format: str = "webdataset"
    shard_size: int = 1000
    resize: int | None = None
    jpeg_quality: int = 95

    def __post_init__(self):
        object.__setattr__(self, "format", choose("format", self.format, FORMATS))
        for name in ("shard_size", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        if not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"jpeg_quality {self.jpeg_quality}: must lie between 1 and 95")

    def facts(self, table: Table) -> dict[str, Any]:
        """All that decides what the shards hold, fit for JSON.

        Raises:
            `ValueError`: If there is a least score without a column of scores, or the other way round.
        """
        if self.filters.min_aesthetic is not None and table.aesthetic_column is None:
            raise ValueError(f"min_aesthetic {self.filters.min_aesthetic}: needs aesthetic_column")
        if self.filters.min_aesthetic is None and table.aesthetic_column is not None:
            raise ValueError(f"aesthetic_column '{table.aesthetic_column}': needs min_aesthetic")
        own = asdict(self)
        return json.loads(json.dumps({"columns": table.columns, "table": table.digest, **own.pop("filters"), **own}))


@dataclass
class Progress:
    """How far a preparation has come when a shard is finished.

    Attributes:
        candidates (`int`): Rows whose pictures are settled, of those that passed [`ROW_RULES`].
        kept (`int`): Of these, in shards.
        shards (`int`): Finished.
        dropped (`Counter`): Reason -> count of the others.
        changed (`Counter`): What was done to pictures that were kept -> count.
        examples (`dict[str, str]`): Reason -> the first picture that was dropped for it.
        hashes (`set[str]`): Of the pictures that were kept.
    """

    candidates: int = 0
    kept: int = 0
    shards: int = 0
    dropped: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)


@typed
def prepare(
    table: Table,
    output_dir: str | Path,
    settings: PreparationSettings = PreparationSettings(),
    downloads: DownloadSettings | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fetches, filters and writes; continues what was stopped. Finished shards are never written again.

    Args:
        table ([`Table`]): Where captions and pictures come from.
        output_dir (`str` or `Path`): A new or empty folder, or one that the same preparation began to fill.
        settings ([`PreparationSettings`], *optional*): What the shards hold.
        downloads ([`DownloadSettings`], *optional*): How pictures are fetched.
        overwrite (`bool`, defaults to `False`): Delete the shards of another preparation that the folder holds, and
            move other files in their place to `.replaced-1`.

    Returns:
        `dict`: The report, which is also in `report.json`: `rows` of the table, `kept`, `shards`, `dropped` (reason ->
        count; with `kept` they add up to `rows`), `examples` (reason -> the first picture that was dropped for it),
        `changed` (what was done to pictures -> count) and `settings`.

    Raises:
        `ValueError`: If the folder holds anything else, another process fills it, or no picture is left.
        `ConnectionError`: If many servers in a row cannot be reached. What is finished stays.
    """
    with claimed(output_dir) as folder:
        return _prepare(table, folder, settings, downloads or DownloadSettings(), overwrite)


def _prepare(
    table: Table, folder: Path, settings: PreparationSettings, downloads: DownloadSettings, overwrite: bool
) -> dict[str, Any]:
    facts, state = settings.facts(table), folder / STATE
    check_state(folder)
    try:
        report = check_folder(folder, facts, len(table))
    except OutputFolderError:
        if not overwrite:
            raise
        report = discard(folder)
    if report is not None or not (state / SETTINGS).is_file():
        _clear(state)  # killed just before, or in the midst of this
    if report is not None:
        return report
    write_text(state / SETTINGS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    positions, dropped = select(table, settings.filters)
    progress = read_progress(folder, facts, len(positions))
    for name in (shard_name(number, settings.format) for number in range(progress.shards)):
        if (state / name).is_file():  # killed just before this
            _put_in_place(folder, name)
    if positions:
        asyncio.run(_fill(table, positions, folder, settings, downloads, progress))
    dropped += progress.dropped
    if not progress.kept:
        _clear(state)
        told = ", ".join(
            f"{reason} {count}{first_of(reason, progress.examples)}" for reason, count in dropped.most_common()
        )
        raise ValueError(f"no picture is left of {len(table)} rows: {told}")
    report = {
        "rows": len(table),
        "kept": progress.kept,
        "shards": progress.shards,
        "dropped": _sorted(dropped),
        "examples": progress.examples,
        "changed": _sorted(progress.changed),
        "settings": facts,
    }
    write_own(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _clear(state)
    return report


def check_state(folder: Path) -> None:
    """Whether what is written can take its place in a folder, if need be in that of other files.

    Raises:
        `ValueError`: If `STATE` is no folder, or something else is one.
    """
    state = folder / STATE
    if state.is_symlink() or (state.exists() and not state.is_dir()):
        what = "a link" if state.is_symlink() else "a file"
        raise OutputFolderError(f"output_dir {folder}: {STATE} is {what}, not a folder; remove it, or give another")
    for path in folder.glob("*"):
        if (path.name == REPORT or _OWN.fullmatch(path.name)) and path.is_dir():
            raise OutputFolderError(f"output_dir {folder}: {path.name} is a folder; remove it, or give another")


def check_folder(folder: Path, facts: dict[str, Any], rows: int) -> dict[str, Any] | None:
    """Whether a folder may be filled; the report if this has been done already.

    Args:
        folder (`Path`): The output folder, which may be absent.
        facts (`dict`): [`PreparationSettings.facts`] about the table.
        rows (`int`): Of the table.

    Raises:
        `ValueError`: If it holds anything but this preparation, or that is damaged.
    """
    path = next((path for path in (folder / REPORT, folder / STATE / SETTINGS) if path.is_file()), None)
    if path is None:
        if found := [item.name for item in folder.glob("*") if item.name not in (STATE, LOCK, RECORD)]:
            raise OutputFolderError(f"output_dir {folder}: holds something else ({min(found)}); {_ADVICE}")
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        earlier = known["settings"] if path.name == REPORT else known
        differing = [name for name in {**facts, **earlier} if earlier.get(name) != facts.get(name)]
        different = [f"{name} {earlier.get(name)!s:.200}, not {facts.get(name)!s:.200}" for name in differing[:1]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise OutputFolderError(f"output_dir {folder}: {path.name} is none of a preparation; {_ADVICE}") from None
    if different:
        raise OutputFolderError(f"output_dir {folder}: holds another preparation ({different[0]}); {_ADVICE}")
    if path.name == SETTINGS:
        read_progress(folder, facts, rows)
        return None
    if not _is_report(known, rows, facts["shard_size"]):
        raise OutputFolderError(f"output_dir {folder}: {REPORT} is damaged; {_ADVICE}")
    for name in (shard_name(number, facts["format"]) for number in range(known["shards"])):
        if not (folder / name).is_file():
            raise OutputFolderError(f"output_dir {folder}: {name} was finished and is gone; {_ADVICE}")
    return known


def _is_report(known: dict, rows: int, shard_size: int) -> bool:
    kept, dropped, shards = (known.get(name) for name in ("kept", "dropped", "shards"))
    return (
        all(map(_is_count, (known.get("rows"), kept, shards)))
        and _are_counts(dropped, known.get("changed"))
        and _are_texts(known.get("examples", {}))
        and known["rows"] == rows == kept + sum(dropped.values())
        and shards == -(-kept // shard_size) > 0
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(*values: Any) -> bool:
    return all(isinstance(value, dict) and all(map(_is_count, value.values())) for value in values)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def discard(folder: Path) -> None:
    """Deletes what another preparation wrote; other shards and reports are moved."""
    _clear(folder / STATE)
    make_way(folder, [REPORT, *(path.name for path in folder.glob("train-*"))])


def _clear(state: Path) -> None:
    """Deletes what is written there, the settings first; with anything else in it the folder stays."""
    for path in sorted(state.glob("*"), key=lambda path: path.name != SETTINGS):
        if _OWN.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()
    with suppress(OSError):
        state.rmdir()


def select(table: Table, filters: Filters) -> tuple[list[int], Counter]:
    """What can be said before anything is fetched.

    Returns:
        `tuple[list[int], Counter]`: The positions of rows whose pictures are to be fetched, and reason -> count of the
        others. Of several rows with one address, the first that passes the other rules stays.
    """
    positions, dropped, seen = [], Counter(), set()
    for position, row in enumerate(tqdm(table, desc="reading the table", unit="row", dynamic_ncols=True, delay=1)):
        reason = reason_to_drop(ROW_RULES, row, filters)
        if reason is None and row.address in seen:
            reason = SAME_ADDRESS
        if reason is None:
            seen.add(row.address)
            positions.append(position)
        else:
            dropped[reason] += 1
    return positions, dropped


async def _fill(
    table: Table,
    positions: list[int],
    folder: Path,
    settings: PreparationSettings,
    downloads: DownloadSettings,
    progress: Progress,
) -> None:
    """Settles the candidates that are left, in their order, and writes those that are kept into shards."""
    slots = asyncio.Semaphore(downloads.concurrency)

    async def settle(row: Row) -> tuple[Picture | str, tuple[str, ...]]:
        async with slots:
            try:
                data, changes = await fetcher.fetch(row)
                options = (settings.filters, settings.resize, settings.jpeg_quality)
                picture = await asyncio.to_thread(read_picture, data, *options)
            except Dropped as reason:
                return str(reason), ()
        return picture, (*changes, *picture.changes)

    rows = (table[position] for position in positions[progress.candidates :])
    bar = tqdm(desc="pictures", total=len(positions), initial=progress.candidates, unit="row", dynamic_ncols=True)
    shard, dead_hosts = None, set()
    with bar:
        async with (
            Fetcher(downloads) as fetcher,
            aclosing(_in_order(rows, settle, AHEAD * downloads.concurrency)) as settled,
        ):
            async for row, (outcome, changes) in settled:
                _check_network(row, outcome, dead_hosts)
                progress.candidates += 1
                if isinstance(outcome, Picture) and outcome.sha256 in progress.hashes:
                    outcome = SAME_PICTURE
                if isinstance(outcome, Picture):
                    shard = shard or _Shard(folder, settings.format, progress)
                    shard.add(row, outcome)
                    progress.changed.update(changes)
                else:
                    progress.dropped[outcome] += 1
                    progress.examples.setdefault(outcome, row.address)
                if shard and shard.size == settings.shard_size:
                    await asyncio.to_thread(shard.finish)
                    shard = None
                bar.set_postfix(kept=progress.kept, refresh=False)
                bar.update()
            if shard:
                shard.finish()


async def _in_order(
    rows: Iterable[Row], settle: Callable[[Row], Awaitable[Any]], ahead: int
) -> AsyncIterator[tuple[Row, Any]]:
    """Each row with what becomes of it, in their order, while up to `ahead` of them are under way."""
    waiting = deque()
    try:
        for row in rows:
            waiting.append((row, asyncio.ensure_future(settle(row))))
            await asyncio.sleep(0)  # awaiting what is done already gives the others no time
            if len(waiting) == ahead:
                first, task = waiting.popleft()
                yield first, await task
        while waiting:
            first, task = waiting.popleft()
            yield first, await task
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


class _Shard:
    """The shard that is being filled; it takes its place, and `progress` counts it, when it is finished."""

    def __init__(self, folder: Path, form: str, progress: Progress):
        self.folder = folder
        self.progress = progress
        self.name = shard_name(progress.shards, form)
        self.hashes = []
        (folder / STATE / self.name).unlink(missing_ok=True)  # it may be a link
        self._file = FORMATS[form](folder / STATE / self.name)

    @property
    def size(self) -> int:
        return len(self.hashes)

    def add(self, row: Row, picture: Picture) -> None:
        self._file.add(f"{self.progress.kept:06}", row, picture)
        self.hashes.append(picture.sha256)
        self.progress.hashes.add(picture.sha256)
        self.progress.kept += 1

    def finish(self) -> None:
        """The shard goes to disk, then its record, then the shard to its place, which a new start makes up for."""
        self._file.close()
        record = {
            name: getattr(self.progress, name) for name in ("candidates", "kept", "dropped", "changed", "examples")
        }
        write_text(_record(self.folder, self.progress.shards), json.dumps({**record, "hashes": self.hashes}))
        _put_in_place(self.folder, self.name)
        self.progress.shards += 1


def shard_name(number: int, form: str) -> str:
    """`datasets` takes files of this name for the split "train", and no other file of the folder."""
    return f"train-{number:05}{FORMATS[form].suffix}"


def _record(folder: Path, number: int) -> Path:
    return folder / STATE / f"{number:05}.json"


def _put_in_place(folder: Path, name: str) -> None:
    """A finished shard."""
    made = (folder / STATE / name).stat()
    make_way(folder, [name])
    record_written(folder, states={name: [made.st_size, made.st_mtime_ns]})
    os.replace(folder / STATE / name, folder / name)


def read_progress(folder: Path, facts: dict[str, Any], most: int) -> Progress:
    """What the records of finished shards say.

    Args:
        folder (`Path`): The output folder.
        facts (`dict`): [`PreparationSettings.facts`] about the table.
        most (`int`): Candidates there can be.

    Raises:
        `ValueError`: If a record is damaged, or its shard is gone.
    """
    progress = Progress()
    while (path := _record(folder, progress.shards)).is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record, progress, facts["shard_size"], most):
            raise OutputFolderError(f"{path}: broken record; delete it to prepare its shard again")
        name = shard_name(progress.shards, facts["format"])
        if not any((place / name).is_file() for place in (folder / STATE, folder)):
            raise OutputFolderError(
                f"output_dir {folder}: {name} was finished and is gone; delete {path} to prepare it again"
            )
        progress.candidates, progress.kept = record["candidates"], record["kept"]
        progress.dropped, progress.changed = Counter(record["dropped"]), Counter(record["changed"])
        progress.examples = record.get("examples", {})
        progress.hashes.update(record["hashes"])
        progress.shards += 1
    return progress


def _is_record(record: Any, before: Progress, shard_size: int, most: int) -> bool:
    """Whether this can be how far it had come with a shard, after that `before`."""
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
        and kept + sum(dropped.values()) == candidates <= most
    )


def _check_network(row: Row, outcome: Picture | str, dead_hosts: set[str]) -> None:
    """Stops before a network that is down passes for thousands of dead addresses."""
    if outcome not in UNREACHABLE:
        dead_hosts.clear()
        return
    dead_hosts.add(row.address.split("/")[2].lower())
    if len(dead_hosts) == MAX_DEAD_HOSTS:
        raise ConnectionError(
            f"{MAX_DEAD_HOSTS} servers in a row cannot be reached, the last {row.address}: is the network down?"
            " The same command continues"
        )


def first_of(reason: str, examples: dict[str, str]) -> str:
    """What a message says of an example."""
    return f" (the first: {examples[reason]:.200})" if reason in examples else ""


def _sorted(counts: Counter) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
