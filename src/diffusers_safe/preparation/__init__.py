"""Preparation of training data: from a table of captions and URLs, or a folder of images, to shards."""

from .downloads import DownloadSettings
from .filters import Filters
from .prepare import ShardSettings, example_of, prepare, settings_record
from .progress import REPORT, check_folder, check_state
from .shards import FORMATS
from .table import Table, read_table


__all__ = [
    "FORMATS",
    "REPORT",
    "DownloadSettings",
    "Filters",
    "ShardSettings",
    "Table",
    "check_folder",
    "check_state",
    "example_of",
    "prepare",
    "read_table",
    "settings_record",
]
