"""Prepares training data: writes a table of captions and URLs, or a folder of pictures, to shards for load_dataset.

    diffusers-safe prepare-data laion.parquet --url_column URL --caption_column TEXT \\
        --aesthetic_column AESTHETIC_SCORE --min_aesthetic 6 --min_side 512 --max_aspect_ratio 2 --resize 512 \\
        --forbidden_concepts concepts.txt --output_dir data/laion
    diffusers-safe prepare-data photos --format parquet --output_dir data/photos

The source is a table (.parquet, .csv, .jsonl, or a pattern of several), a folder of pictures with captions
(metadata.csv or .jsonl with a column file_name, or a .txt file next to each picture), a folder of WebDataset tar files
(such as img2dataset writes), or a dataset on the Hugging Face Hub. The number of dropped rows by reason is printed and
written to report.json. A stopped run continues when the same command is started again.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import exit_with_error, parse_dataclass, typed
from ..concepts import read_concepts
from ..output_folders import OVERWRITE_HELP, check_claim
from ..preparation import (
    FORMATS,
    DownloadSettings,
    Filters,
    PreparationSettings,
    check_folder,
    check_state,
    example_of,
    prepare,
    read_table,
)


@typed
@dataclass
class PrepareDataArguments:
    source: str = field(
        metadata={"help": "Table, folder of pictures or dataset on the Hub. The name --source may be omitted."}
    )
    output_dir: str = field(metadata={"help": "Folder for the shards: new or empty."})
    format: str = field(
        default="webdataset", metadata={"help": f"Format of the shards: {', '.join(FORMATS)}.", "choices": FORMATS}
    )
    url_column: str | None = field(
        default=None, metadata={"help": "Column of URLs of a table or dataset. Default: url."}
    )
    caption_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of captions, default: text. For tar files a field of the .json files, default: .txt files."
        },
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": 'Split of a table or dataset, default: train. "train[:1000]" takes the first thousand rows.'
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    aesthetic_column: str | None = field(default=None, metadata={"help": "Column of scores, for --min_aesthetic."})
    min_aesthetic: float | None = field(default=None, metadata={"help": "Minimum score."})
    min_side: int = field(
        default=1, metadata={"help": "Minimum length of the shorter side in pixels, before --resize."}
    )
    max_aspect_ratio: float | None = field(
        default=None, metadata={"help": "Maximum ratio of the longer to the shorter side."}
    )
    min_caption_length: int = field(default=1, metadata={"help": "Minimum length of a caption in characters."})
    forbidden_concepts: list[str] = field(
        default_factory=list,
        metadata={"help": "Drop captions with one of these as whole words: names, or a .txt file with one per line."},
    )
    resize: int | None = field(
        default=None, metadata={"help": "Length of the shorter side in pixels, to which larger pictures are resized."}
    )
    jpeg_quality: int = field(default=95, metadata={"help": "JPEG quality, 1 to 95."})
    shard_size: int = field(default=1000, metadata={"help": "Pictures per shard."})
    timeout: float = field(default=10, metadata={"help": "Seconds for the whole answer of a server."})
    retries: int = field(default=2, metadata={"help": "Further attempts if a server is slow or busy."})
    concurrency: int = field(default=32, metadata={"help": "Number of simultaneous downloads."})
    user_agent: str | None = field(
        default=None, metadata={"help": "User-Agent header. Default: name and version of this package."}
    )

    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})
    allow_private_addresses: bool = field(
        default=False,
        metadata={
            "help": "Also download from this computer and from private networks (loopback, link-local, private"
            " addresses). By default such rows are dropped."
        },
    )

    def __post_init__(self):
        filters = Filters(
            self.min_caption_length,
            tuple(read_concepts(self.forbidden_concepts, "forbidden_concepts")) if self.forbidden_concepts else (),
            self.min_aesthetic,
            self.min_side,
            self.max_aspect_ratio,
        )
        self.settings = PreparationSettings(filters, self.format, self.shard_size, self.resize, self.jpeg_quality)
        self.downloads = DownloadSettings(
            self.timeout, self.retries, self.concurrency, self.user_agent, self.allow_private_addresses
        )


def check_surroundings(args: PrepareDataArguments) -> None:
    """Checks the table, its columns and the output folder."""
    columns = (args.url_column, args.caption_column, args.aesthetic_column)
    args.table = read_table(args.source, *columns, args.dataset_config_name, args.split)
    record = args.settings.record(args.table)
    check_claim(args.output_dir)
    check_state(Path(args.output_dir))
    if not args.overwrite:
        check_folder(Path(args.output_dir), record, len(args.table))


def report_lines(report: dict) -> list[str]:
    """The lines of the report: a number and what it counts."""
    lines = [f"{report['rows']:>9}  rows", f"{report['kept']:>9}  kept"]
    examples = report.get("examples", {})
    lines += [f"{count:>9}  dropped: {why}{example_of(why, examples)}" for why, count in report["dropped"].items()]
    lines += [f"{count:>9}  of those kept: {change}" for change, count in report["changed"].items()]
    return lines


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(PrepareDataArguments, __doc__, argv, prog, check_surroundings, positional="source")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about unusual files; unreadable ones are counted
    with exit_with_error():
        report = prepare(args.table, args.output_dir, args.settings, args.downloads, args.overwrite)
    print("\n".join(report_lines(report)))
    shards = f"{report['shards']} shard{'s' if report['shards'] > 1 else ''}"
    print(f"{shards} and report.json in {Path(args.output_dir).resolve()}")
