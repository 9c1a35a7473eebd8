"""Preparation of training data: from a table of captions and URLs, or a folder of pictures, to shards."""

from .downloads import DownloadSettings
from .filters import Filters
from .prepare import PreparationSettings, example_of, prepare
from .progress import REPORT, check_folder, check_state
from .shards import FORMATS
from .table import Table, read_table


__all__ = [
    "FORMATS",
    "REPORT",
    "DownloadSettings",
    "Filters",
    "PreparationSettings",
    "Table",
    "check_folder",
    "check_state",
    "example_of",
    "prepare",
    "read_table",
]
