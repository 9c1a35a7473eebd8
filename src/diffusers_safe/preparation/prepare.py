"""Writes the rows of a table that pass the filters to shards, in the order of the table and each image once.

The output folder contains `train-00000.tar` (or `.parquet`), ... and, at the end, `report.json`. A stopped run
continues after the last finished shard and writes the same files ([`progress`]).
"""

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..arguments import option, typed
from ..files import write_text
from ..output_folders import OutputFolderError, claimed, write_own
from .downloads import UNREACHABLE, DownloadSettings, Fetcher
from .filters import ROW_RULES, Dropped, Filters, reason_to_drop
from .pictures import Picture, read_picture
from .progress import (
    REPORT,
    SETTINGS,
    STATE,
    Progress,
    check_folder,
    check_state,
    clear_state,
    discard,
    move_shard,
    read_progress,
    shard_name,
)
from .shards import FORMATS
from .table import Row, Table


SAME_ADDRESS, SAME_PICTURE = "same address as before", "same picture as before"
PENDING_PER_DOWNLOAD = 32  # images that are loading or wait for an earlier one, per download at a time
MAX_UNREACHABLE_HOSTS = 50  # different servers in a row; after that, the network is assumed to be down


@typed
@dataclass(frozen=True)
class ShardSettings:
    """How images are written.

    Args:
        format (`str`, defaults to `"webdataset"`): One of `FORMATS`.
        shard_size (`int`, defaults to 1000): Samples per shard; the last shard has the remaining ones.
        resize (`int`, *optional*): Length of the shorter side in pixels. Larger images are resized to it, smaller
            ones are not enlarged.
        jpeg_quality (`int`, defaults to 95): JPEG quality, 1 to 95.
    """

    format: str = option("webdataset", f"Format of the shards: {', '.join(FORMATS)}.", FORMATS)
    shard_size: int = option(1000, "Number of images per shard.", at_least=1)
    resize: int | None = option(
        None, "Resize larger images to this length of the shorter side, in pixels.", at_least=1
    )
    jpeg_quality: int = option(95, "JPEG quality, 1 to 95.", at_least=1, at_most=95)


def settings_record(table: Table, filters: Filters, shards: ShardSettings) -> dict[str, Any]:
    """Everything that determines the content of the shards, as JSON values.

    Raises:
        `ValueError`: If only one of `min_aesthetic` and the table's aesthetic column is given.
    """
    if filters.min_aesthetic is not None and table.aesthetic_column is None:
        raise ValueError(f"min_aesthetic {filters.min_aesthetic}: needs aesthetic_column")
    if filters.min_aesthetic is None and table.aesthetic_column is not None:
        raise ValueError(f"aesthetic_column '{table.aesthetic_column}': needs min_aesthetic")
    record = {"columns": table.columns, "table": table.digest, **asdict(filters), **asdict(shards)}
    return json.loads(json.dumps(record))


@typed
def prepare(
    table: Table,
    output_dir: str | Path,
    filters: Filters | None = None,
    shards: ShardSettings | None = None,
    downloads: DownloadSettings | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Downloads, filters and writes the images of a table. Continues a stopped run; finished shards are not
    written again.

    Args:
        table ([`Table`]): Captions and URLs, or file names, of images.
        output_dir (`str` or `Path`): A new or empty folder, or that of the same preparation when it was stopped.
        filters ([`Filters`], *optional*): Which rows and images to keep.
        shards ([`ShardSettings`], *optional*): How images are written.
        downloads ([`DownloadSettings`], *optional*): How images are downloaded.
        overwrite (`bool`, defaults to `False`): Delete the shards of another preparation in the folder, and move
            other files with their names to `.replaced-1`.

    Returns:
        `dict`: The report, which is also written to `report.json`: `rows` of the table, `kept`, `shards`, `dropped`
        (number by reason; together with `kept` they add up to `rows`), `examples` (the first dropped image of each
        reason), `changed` (number of images by change) and `settings`.

    Raises:
        `ValueError`: If the folder contains anything else, another process writes to it, or no image is left.
        `ConnectionError`: If many servers in a row cannot be reached. Finished shards are kept.
    """
    with claimed(output_dir) as folder:
        settings = (filters or Filters(), shards or ShardSettings(), downloads or DownloadSettings())
        return _prepare(table, folder, *settings, overwrite)


def _prepare(
    table: Table, folder: Path, filters: Filters, shards: ShardSettings, downloads: DownloadSettings, overwrite: bool
) -> dict[str, Any]:
    record = settings_record(table, filters, shards)
    check_state(folder)
    try:
        report = check_folder(folder, record, len(table))
    except OutputFolderError:
        if not overwrite:
            raise
        report = discard(folder)
    if report is not None or not (folder / STATE / SETTINGS).is_file():
        clear_state(folder)  # a run that was stopped during its first or last step leaves files there
    if report is not None:
        return report
    write_text(folder / STATE / SETTINGS, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    positions, dropped = select(table, filters)
    progress = read_progress(folder, record, len(positions))
    for name in (shard_name(number, shards.format) for number in range(progress.shards)):
        if (folder / STATE / name).is_file():  # the run was stopped before it moved the shard
            move_shard(folder, name)
    if positions:
        asyncio.run(_write_shards(table, positions, folder, filters, shards, downloads, progress))
    dropped += progress.dropped
    if not progress.kept:
        clear_state(folder)
        reasons = [f"{why} {count}{example_of(why, progress.examples)}" for why, count in dropped.most_common()]
        raise ValueError(f"no image is left of {len(table)} rows: {', '.join(reasons)}")
    report = {
        "rows": len(table),
        "kept": progress.kept,
        "shards": progress.shards,
        "dropped": _sorted(dropped),
        "examples": progress.examples,
        "changed": _sorted(progress.changed),
        "settings": record,
    }
    write_own(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    clear_state(folder)
    return report


def select(table: Table, filters: Filters) -> tuple[list[int], Counter]:
    """Applies the filters that need no image.

    Returns:
        `tuple[list[int], Counter]`: The positions of the remaining rows, the candidates, and the number of dropped
        rows by reason. Of several rows with the same URL or file, the first that passes the other filters remains.
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


async def _write_shards(
    table: Table,
    positions: list[int],
    folder: Path,
    filters: Filters,
    shards: ShardSettings,
    downloads: DownloadSettings,
    progress: Progress,
) -> None:
    """Loads the remaining candidates in their order and writes those that are kept to shards."""
    slots = asyncio.Semaphore(downloads.concurrency)

    async def load(row: Row) -> tuple[Picture | str, tuple[str, ...]]:
        """An image and the changes to it, or the reason to drop it."""
        async with slots:
            try:
                data, changes = await fetcher.fetch(row)
                picture = await asyncio.to_thread(read_picture, data, filters, shards.resize, shards.jpeg_quality)
            except Dropped as reason:
                return str(reason), ()
        return picture, (*changes, *picture.changes)

    rows = (table[position] for position in positions[progress.candidates :])
    bar = tqdm(desc="images", total=len(positions), initial=progress.candidates, unit="row", dynamic_ncols=True)
    shard, unreachable_hosts = None, set()
    with bar:
        async with (
            Fetcher(downloads) as fetcher,
            aclosing(_map_in_order(load, rows, PENDING_PER_DOWNLOAD * downloads.concurrency)) as loaded,
        ):
            async for row, (outcome, changes) in loaded:
                _check_network(row, outcome, unreachable_hosts)
                progress.candidates += 1
                if isinstance(outcome, Picture) and outcome.sha256 in progress.hashes:
                    outcome = SAME_PICTURE
                if isinstance(outcome, Picture):
                    shard = shard or _OpenShard(folder, shards.format, progress)
                    shard.add(row, outcome, changes)
                else:
                    progress.drop(outcome, row.address)
                if shard and len(shard.hashes) == shards.shard_size:
                    await asyncio.to_thread(shard.finish)
                    shard = None
                bar.set_postfix(kept=progress.kept, refresh=False)
                bar.update()
            if shard:
                shard.finish()


async def _map_in_order(
    function: Callable[[Row], Awaitable[Any]], rows: Iterable[Row], max_pending: int
) -> AsyncIterator[tuple[Row, Any]]:
    """Each row with its result, in the order of the rows, while up to `max_pending` calls run at a time."""
    pending = deque()
    try:
        for row in rows:
            pending.append((row, asyncio.ensure_future(function(row))))
            await asyncio.sleep(0)  # awaiting a finished task does not give the others time to run
            if len(pending) == max_pending:
                first, task = pending.popleft()
                yield first, await task
        while pending:
            first, task = pending.popleft()
            yield first, await task
    finally:
        for _, task in pending:
            task.cancel()
        await asyncio.gather(*(task for _, task in pending), return_exceptions=True)


class _OpenShard:
    """The shard that is being written."""

    def __init__(self, folder: Path, format: str, progress: Progress):
        self.folder, self.progress = folder, progress
        self.name = shard_name(progress.shards, format)
        self.hashes: list[str] = []
        (folder / STATE / self.name).unlink(missing_ok=True)  # it may be a link
        self._file = FORMATS[format](folder / STATE / self.name)

    def add(self, row: Row, picture: Picture, changes: Iterable[str]) -> None:
        self._file.add(f"{self.progress.kept:06}", row, picture)
        self.hashes.append(picture.sha256)
        self.progress.hashes.add(picture.sha256)
        self.progress.kept += 1
        self.progress.changed.update(changes)

    def finish(self) -> None:
        self._file.close()
        self.progress.finish_shard(self.folder, self.name, self.hashes)


def _check_network(row: Row, outcome: Picture | str, unreachable_hosts: set[str]) -> None:
    """Stops the run if the network seems to be down, before thousands of rows are dropped for it."""
    if outcome not in UNREACHABLE:
        unreachable_hosts.clear()
        return
    unreachable_hosts.add(row.address.split("/")[2].lower())
    if len(unreachable_hosts) == MAX_UNREACHABLE_HOSTS:
        raise ConnectionError(
            f"{MAX_UNREACHABLE_HOSTS} servers in a row cannot be reached, the last {row.address}: is the network"
            " down? The same command continues"
        )


def example_of(reason: str, examples: dict[str, str]) -> str:
    """The example of a reason, for a message; `""` if there is none."""
    return f" (the first: {examples[reason]:.200})" if reason in examples else ""


def _sorted(counts: Counter) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
