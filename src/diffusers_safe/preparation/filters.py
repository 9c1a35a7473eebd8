"""Filters for rows and images, and the reasons under which dropped rows are counted."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..arguments import option, typed
from ..concepts import naming_pattern
from .table import Row


@typed
@dataclass(frozen=True)
class Filters:
    """Conditions for captions and images. The defaults only require a caption.

    Args:
        min_caption_length (`int`, defaults to 1): Minimum length of a caption in characters.
        forbidden_concepts (`tuple[str, ...]`, defaults to `()`): Captions must not contain any of these as whole
            words, in any case.
        min_aesthetic (`float`, *optional*): Minimum aesthetic score. Rows without a score are dropped.
        min_side (`int`, defaults to 1): Minimum length of the shorter side of the upright image, in pixels.
        max_aspect_ratio (`float`, *optional*): Maximum ratio of the longer to the shorter side, at least 1.
    """

    min_caption_length: int = option(1, "Minimum length of a caption in characters.", at_least=1)
    forbidden_concepts: tuple[str, ...] = option(
        (), "Drop rows whose captions contain one of these concepts: names, or a .txt file with one per line."
    )
    min_aesthetic: float | None = option(None, "Minimum aesthetic score; needs --aesthetic_column.")
    min_side: int = option(1, "Minimum length of an image's shorter side in pixels, before --resize.", at_least=1)
    max_aspect_ratio: float | None = option(
        None, "Maximum ratio of an image's longer side to its shorter side.", at_least=1
    )


class Dropped(Exception):
    """Raised when an image is dropped. The message is the reason that is counted."""


# Reason -> condition to drop a row. Checked in this order, before anything is downloaded.
ROW_RULES: dict[str, Callable[[Row, Filters], bool]] = {
    "no address": lambda row, _: not _is_address(row),
    "no caption": lambda row, _: not row.caption,
    "null character in the caption": lambda row, _: "\0" in row.caption,  # which no reader of the shards accepts
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
# Reason -> condition to drop an image of this (width, height).
SIZE_RULES: dict[str, Callable[[tuple[int, int], Filters], bool]] = {
    "short side": lambda size, filters: min(size) < filters.min_side,
    "aspect ratio": lambda size, filters: (
        filters.max_aspect_ratio is not None and max(size) > filters.max_aspect_ratio * min(size)
    ),
}


def reason_to_drop(rules: dict[str, Callable[[Any, Filters], bool]], value: Any, filters: Filters) -> str | None:
    """The first reason to drop a value, or `None`."""
    return next((reason for reason, applies in rules.items() if applies(value, filters)), None)


def _is_address(row: Row) -> bool:
    if row.folder is not None:
        return bool(row.address)
    return re.match(r"https?://[^/\s]", row.address, re.IGNORECASE) is not None
