"""Training data made ready: from captions and web addresses, or a folder of pictures, to shards of both."""

from .downloads import DownloadSettings
from .filters import Filters
from .prepare import REPORT, PreparationSettings, check_folder, check_state, first_of, prepare
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
    "first_of",
    "prepare",
    "read_table",
]
