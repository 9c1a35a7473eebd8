"""What is dropped, and the reason that is counted for it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..arguments import typed
from ..concepts import naming_pattern
from .table import Row


@typed
@dataclass(frozen=True)
class Filters:
    """What a picture and its caption must be like. The defaults ask for a caption only.

    Attributes:
        min_caption_length (`int`, defaults to 1): In characters.
        forbidden_concepts (`tuple[str, ...]`): None of them may be in the caption, as whole words in whatever case.
        min_aesthetic (`float`, *optional*): Least score. A row without one is dropped.
        min_side (`int`, defaults to 1): In pixels, of the shorter side as the picture is looked at.
        max_aspect_ratio (`float`, *optional*): Longer by shorter side, 1 or more.
    """

    min_caption_length: int = 1
    forbidden_concepts: tuple[str, ...] = ()
    min_aesthetic: float | None = None
    min_side: int = 1
    max_aspect_ratio: float | None = None

    def __post_init__(self):
        for name in ("min_caption_length", "min_side", "max_aspect_ratio"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} {value}: must be at least 1")


class Dropped(Exception):
    """Ends the way of one picture; its text is the reason that is counted."""


# reason -> whether it holds, asked in this order before anything is fetched
ROW_RULES: dict[str, Callable[[Row, Filters], bool]] = {
    "no address": lambda row, _: not _is_address(row),
    "no caption": lambda row, _: not row.caption,
    "short caption": lambda row, filters: len(row.caption) < filters.min_caption_length,
    "forbidden concept": lambda row, filters: (
        bool(filters.forbidden_concepts)
        and naming_pattern(tuple(filters.forbidden_concepts)).search(row.caption) is not None
    ),
    "no aesthetic score": lambda row, filters: filters.min_aesthetic is not None and row.aesthetic is None,
    "low aesthetic score": lambda row, filters: (
        filters.min_aesthetic is not None and row.aesthetic < filters.min_aesthetic
    ),
}
# the same for a picture's (width, height)
SIZE_RULES: dict[str, Callable[[tuple[int, int], Filters], bool]] = {
    "short side": lambda size, filters: min(size) < filters.min_side,
    "aspect ratio": lambda size, filters: (
        filters.max_aspect_ratio is not None and max(size) > filters.max_aspect_ratio * min(size)
    ),
}


def reason_to_drop(rules: dict[str, Callable[[Any, Filters], bool]], value: Any, filters: Filters) -> str | None:
    """The first reason that holds; `None` if the value stays."""
    return next((reason for reason, holds in rules.items() if holds(value, filters)), None)


def _is_address(row: Row) -> bool:
    if row.folder is not None:
        return bool(row.address)
    return re.match(r"https?://[^/\s]", row.address, re.IGNORECASE) is not None
