"""Fills shards from a table: what passes the filters, in the order of the table, each picture once.

The output folder holds `train-00000.tar` (or `.parquet`), ... and, when all is done, `report.json`. Until then there
is `.preparation/`: the settings, the shard that is being written, and a record of each finished one. A shard counts
from the moment its record is there; a run that was killed goes on behind the last record, and comes to the same files.
"""

import asyncio
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..arguments import choose, typed
from ..output_folders import LOCK, OutputFolderError, claimed, make_way
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
    try:
        report = check_folder(folder, facts)
    except OutputFolderError:
        if not overwrite:
            raise
        report = discard(folder)
    if report is not None:
        shutil.rmtree(state, ignore_errors=True)  # killed just before this
        return report
    write_text(state / SETTINGS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    positions, dropped = select(table, settings.filters)
    progress = _resume(folder, settings.format)
    if positions:
        asyncio.run(_fill(table, positions, folder, settings, downloads, progress))
    dropped += progress.dropped
    if not progress.kept:
        shutil.rmtree(state)
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
    write_text(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(state)
    return report


def check_folder(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Whether a folder may be filled; the report if this has been done already.

    Args:
        folder (`Path`): The output folder, which may be absent.
        facts (`dict`): [`PreparationSettings.facts`] about the table.

    Raises:
        `ValueError`: If it holds anything but this preparation.
    """
    path = next((path for path in (folder / REPORT, folder / STATE / SETTINGS) if path.is_file()), None)
    if path is None:
        if found := [item.name for item in folder.glob("*") if item.name not in (STATE, LOCK)]:
            raise OutputFolderError(f"output_dir {folder}: holds something else ({min(found)}); {_ADVICE}")
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        earlier = known["settings"] if path.name == REPORT else known
        differing = [name for name in {**facts, **earlier} if earlier.get(name) != facts.get(name)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise OutputFolderError(f"output_dir {folder}: {path.name} is none of a preparation; {_ADVICE}") from None
    if differing:
        name = differing[0]
        raise OutputFolderError(
            f"output_dir {folder}: holds another preparation ({name} {earlier.get(name)}, not {facts.get(name)});"
            f" {_ADVICE}"
        )
    return known if path.name == REPORT else None


def discard(folder: Path) -> None:
    """Deletes what another preparation wrote, as its report or its state says; other shards and reports are moved."""
    for path in (folder / REPORT, folder / STATE / SETTINGS):
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            form = (known["settings"] if path.name == REPORT else known)["format"]
            number = known["shards"] if path.name == REPORT else len([*(folder / STATE).glob("[0-9]*.json")])
            own = [shard_name(number, form) for number in range(number)]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        for name in (*own, *([REPORT] if path.name == REPORT else [])):
            (folder / name).unlink(missing_ok=True)
    if (folder / STATE).is_dir() and not (folder / STATE).is_symlink():
        shutil.rmtree(folder / STATE)
    make_way(folder, [STATE, REPORT, *(path.name for path in folder.glob("train-*"))])


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
        """The shard goes to disk, then its record, then the shard to its place, which [`_resume`] makes up for."""
        self._file.close()
        record = {
            name: getattr(self.progress, name) for name in ("candidates", "kept", "dropped", "changed", "examples")
        }
        write_text(_record(self.folder, self.progress.shards), json.dumps({**record, "hashes": self.hashes}))
        os.replace(self.folder / STATE / self.name, self.folder / self.name)
        self.progress.shards += 1


def shard_name(number: int, form: str) -> str:
    """`datasets` takes files of this name for the split "train", and no other file of the folder."""
    return f"train-{number:05}{FORMATS[form].suffix}"


def _record(folder: Path, number: int) -> Path:
    return folder / STATE / f"{number:05}.json"


def _resume(folder: Path, form: str) -> Progress:
    """What the records of finished shards say."""
    progress = Progress()
    while (path := _record(folder, progress.shards)).is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            progress.candidates, progress.kept = record["candidates"], record["kept"]
            progress.dropped, progress.changed = Counter(record["dropped"]), Counter(record["changed"])
            progress.examples = record.get("examples", {})
            progress.hashes.update(record["hashes"])
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path}: broken record; delete it to prepare its shard again") from None
        name = shard_name(progress.shards, form)
        if (folder / STATE / name).is_file():  # killed just before this
            os.replace(folder / STATE / name, folder / name)
        if not (folder / name).is_file():
            raise ValueError(f"output_dir {folder}: {name} was finished and is gone; give a new folder")
        progress.shards += 1
    return progress


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
