"""Prepares training data: writes a table of captions and URLs, or a folder of images, to shards for load_dataset.

    diffusers-safe prepare-data laion.parquet --url_column URL --caption_column TEXT \\
        --aesthetic_column AESTHETIC_SCORE --min_aesthetic 6 --min_side 512 --max_aspect_ratio 2 --resize 512 \\
        --forbidden_concepts concepts.txt --output_dir data/laion
    diffusers-safe prepare-data photos --format parquet --output_dir data/photos

The source is a table (.parquet, .csv, .jsonl, or a pattern of several), a folder of images with captions (in a
metadata.csv, .jsonl or .parquet with a column file_name, or in a .txt file next to each image), a folder of WebDataset
tar files (such as img2dataset writes), or a dataset on the Hugging Face Hub. The number of dropped rows by reason is
printed and written to report.json. A stopped run continues when the same command is started again.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from ..arguments import OptionGroups, group, option, required
from ..command_line import parse_dataclass
from ..concepts import read_concepts
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, check_claim
from ..preparation import (
    DownloadSettings,
    Filters,
    ShardSettings,
    check_folder,
    check_state,
    example_of,
    prepare,
    read_table,
    settings_record,
)


@dataclass
class PrepareDataOptions(OptionGroups):
    source: str = required("Table, folder of images or dataset on the Hub. The name --source may be omitted.")
    output_dir: str = required("Folder for the shards: new or empty, or that of a stopped run of the same command.")
    filters: Filters = group("filters")
    shards: ShardSettings = group("shards")
    downloads: DownloadSettings = group("downloads")
    url_column: str | None = option(None, "Column of the URLs in a table or dataset. Default: url.")
    caption_column: str | None = option(
        None,
        "Column of the captions. Default: text. For tar files, a field of the .json files. Default: the .txt files.",
    )
    aesthetic_column: str | None = option(None, "Column of the aesthetic scores, for --min_aesthetic.")
    split: str | None = option(
        None, 'Split of a table or dataset; "train[:1000]" takes the first thousand rows. Default: train.'
    )
    dataset_config_name: str | None = option(None, "Configuration of a dataset on the Hub, if it has several.")
    overwrite: bool = option(False, OVERWRITE_HELP)


def check_surroundings(options: PrepareDataOptions) -> None:
    """Checks the table, its columns and the output folder."""
    if concepts := options.filters.forbidden_concepts:
        concepts = tuple(read_concepts(list(concepts), "forbidden_concepts"))
        options.filters = replace(options.filters, forbidden_concepts=concepts)
    columns = (options.url_column, options.caption_column, options.aesthetic_column)
    options.table = read_table(options.source, *columns, options.dataset_config_name, options.split)
    record = settings_record(options.table, options.filters, options.shards)
    check_claim(options.output_dir)
    check_state(Path(options.output_dir))
    if not options.overwrite:
        check_folder(Path(options.output_dir), record, len(options.table))


def report_lines(report: dict) -> list[str]:
    """The lines of the report: a number and what it counts."""
    lines = [f"{report['rows']:>9}  rows", f"{report['kept']:>9}  kept"]
    examples = report.get("examples", {})
    lines += [f"{count:>9}  dropped: {why}{example_of(why, examples)}" for why, count in report["dropped"].items()]
    lines += [f"{count:>9}  of those kept: {change}" for change, count in report["changed"].items()]
    return lines


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    options = parse_dataclass(PrepareDataOptions, __doc__, argv, prog, check_surroundings, positional="source")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about unusual files; unreadable ones are counted
    settings = (options.filters, options.shards, options.downloads)
    with exit_with_error():
        report = prepare(options.table, options.output_dir, *settings, options.overwrite)
    print("\n".join(report_lines(report)))
    shards = f"{report['shards']} shard{'s' if report['shards'] > 1 else ''}"
    print(f"{shards} and report.json in {Path(options.output_dir).resolve()}")
