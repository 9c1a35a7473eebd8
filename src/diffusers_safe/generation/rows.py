"""What is generated: rows of prompt and seed, and how they are sampled."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..arguments import typed


OWN_SETTINGS = ("guidance_scale", "height", "width")  # settings that a row may override


@typed
@dataclass(frozen=True)
class PromptRow:
    """One image to generate.

    Attributes:
        id (`str`): Name of the file in the folder: letters, digits, `.`, `_` and `-`.
        prompt (`str`): The prompt.
        seed (`int`): Seed of the image's own generator, 0 to 2^64 - 1.
        labels (`dict`): What a metric needs to know about the row, as JSON values; copied to the manifest.
        guidance_scale (`float`, *optional*): Overrides the guidance scale of the settings.
        height (`int`, *optional*): Overrides the height in pixels; a multiple of 8.
        width (`int`, *optional*): Overrides the width. Height and width are given together.

    Raises:
        `ValueError`: If a value is out of range.
    """

    id: str
    prompt: str
    seed: int
    labels: dict = field(default_factory=dict)
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self):
        _check_json(f"row {self.id}: labels", self.labels)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{,199}", self.id):
            raise ValueError(
                f'row id "{self.id}" is no file name; allowed are letters, digits, ".", "_" and "-", 200 at most'
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"row {self.id} has seed {self.seed}; it must lie between 0 and 2^64 - 1")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"row {self.id} has height {self.height}, width {self.width}; give both or neither")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and (side < 8 or side % 8):
                raise ValueError(f"row {self.id} has {name} {side}; it must be a multiple of 8")


@typed
@dataclass(frozen=True)
class GenerationSettings:
    """How images are sampled. Together with the model and the seed this determines the image.

    Attributes:
        num_inference_steps (`int`, defaults to 25): Number of sampling steps.
        guidance_scale (`float`, defaults to 7.5): Scale of classifier-free guidance; at 1 or less it is off.
        height (`int`, *optional*): Height in pixels, a multiple of 8. Default: the pipeline's.
        width (`int`, *optional*): Width in pixels, a multiple of 8. Default: the pipeline's.
        negative_prompt (`str`, *optional*): What to guide away from.
        call (`dict`, *optional*): Further arguments of the pipeline's call, such as `dict(SafetyConfig.MAX)`, as JSON
            values.

    Raises:
        `ValueError`: If a value is out of range.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    call: dict = field(default_factory=dict)

    def __post_init__(self):
        _check_json("call", self.call)
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; it must be at least 1")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and (side < 8 or side % 8):
                raise ValueError(f"{name} is {side}; it must be a multiple of 8")

    def of_row(self, row: PromptRow) -> "GenerationSettings":
        """These settings with those that the row overrides."""
        own = {name: getattr(row, name) for name in OWN_SETTINGS if getattr(row, name) is not None}
        return replace(self, **own)


def _check_json(name: str, values: dict) -> None:
    try:
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} {values!r:.200}: must be JSON values ({error})") from None


def check_rows(rows: list[PromptRow]) -> None:
    """
    Raises:
        `ValueError`: If there are no rows, or two have the same id.
    """
    if not rows:
        raise ValueError("no rows: there must be at least one image to generate")
    ids = set()
    for row in rows:
        if row.id.casefold() in ids:
            raise ValueError(f"row id {row.id:.80} occurs twice; ids must differ, not only in capital letters")
        ids.add(row.id.casefold())


def different_images(rows: Sequence[PromptRow]) -> int:
    """The number of different images: rows with the same prompt, seed, guidance scale and size give the same image."""
    return len({(row.prompt, row.seed, *(getattr(row, name) for name in OWN_SETTINGS)) for row in rows})
