"""One image of the same prompts and seeds before and after an erasure, with labels and frames around the rows after.

groups = [
    SampleGroup("erased concepts", "gone", ["a knife"], [[knife_before]], [[knife_after]]),
    SampleGroup("other concepts", "kept", ["a cat"], [[cat_before]], [[cat_after]]),
]
draw_grid(groups, "Above: before. Below: after.").save("samples.png")
"""

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..images import to_rgb
from .elements import TONES


GRID_NAME = "samples.png"  # file in the folder of an erased model

# The colours of plots.css.
_PAGE, _INK, _SOFT, _LINE = "#f6f5f1", "#1d2127", "#666d78", "#d9d6cc"
_TONES = dict(zip(TONES, ("#5a48d6", "#17866f")))
_TILE, _GAP, _MARGIN, _GROUP_GAP, _ROW_LABEL = 192, 8, 32, 36, 84
_HEADING_SIZE, _TEXT_SIZE, _CAPTION_SIZE, _LINE_HEIGHT = 24, 18, 16, 22
_MOST_LINES = 3  # lines of a prompt


@dataclass(frozen=True)
class SampleGroup:
    """Columns under one heading, one for each prompt.

    Attributes:
        title (`str`): The heading.
        tone (`str`): Its colour: `"gone"` for erased concepts, `"kept"` for other concepts.
        prompts (`list[str]`): One or more.
        before (`list[list[PIL.Image.Image]]`): For each seed, an image of each prompt.
        after (`list[list[PIL.Image.Image]]`): The same prompts and seeds after the erasure.

    Raises:
        `ValueError`: If the tone is unknown, or an image is missing.
    """

    title: str
    tone: str
    prompts: list[str]
    before: list[list[Image.Image]]
    after: list[list[Image.Image]]

    def __post_init__(self):
        if self.tone not in _TONES:
            raise ValueError(f'tone is "{self.tone}"; allowed are {", ".join(_TONES)}')
        sizes = [len(row) for row in [*self.before, *self.after]]
        if not self.prompts or not sizes or set(sizes) != {len(self.prompts)} or len(self.before) != len(self.after):
            raise ValueError(f"group {self.title}: needs an image of each prompt, before and after, for each seed")

    @property
    def width(self) -> int:
        return len(self.prompts) * (_TILE + _GAP) - _GAP


def draw_grid(
    groups: list[SampleGroup], caption: str = "", sides: tuple[str, str] = ("before", "after")
) -> Image.Image:
    """Draws a column for each prompt, and for each seed a row before and, below it, a row after.

    Images of any size are scaled into squares of 192 pixels. Images that are all black, as safety checkers leave them,
    are labelled.

    Args:
        groups (`list[SampleGroup]`): One or more, with the same number of seeds.
        caption (`str`, defaults to `""`): Text below.
        sides (`tuple[str, str]`, defaults to `("before", "after")`): Labels of the two rows.

    Raises:
        `ValueError`: If there are no groups, or they have different numbers of seeds.
    """
    if len({len(group.before) for group in groups}) != 1:
        raise ValueError("groups: there must be at least one, all with the same number of seeds")
    wrapped = [[_wrap(prompt, _TILE) for prompt in group.prompts] for group in groups]
    prompt_lines = max(len(lines) for prompts in wrapped for lines in prompts)
    top = _MARGIN + _HEADING_SIZE + 18 + prompt_lines * _LINE_HEIGHT + 10
    pair_height = 2 * _TILE + _GAP
    seeds = len(groups[0].before)
    width = 2 * _MARGIN + _ROW_LABEL + sum(group.width for group in groups) + _GROUP_GAP * (len(groups) - 1)
    bottom = top + seeds * pair_height + (seeds - 1) * _GROUP_GAP
    caption_lines = _wrap(caption, width - 2 * _MARGIN - _ROW_LABEL, _CAPTION_SIZE) if caption else []
    height = bottom + (16 + len(caption_lines) * _LINE_HEIGHT if caption_lines else 0) + _MARGIN

    picture = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(picture)
    left = _MARGIN + _ROW_LABEL
    for group, prompts in zip(groups, wrapped):
        _draw_heading(draw, group, prompts, left, top)
        for seed in range(seeds):
            y = top + seed * (pair_height + _GROUP_GAP)
            for column, (before, after) in enumerate(zip(group.before[seed], group.after[seed])):
                x = left + column * (_TILE + _GAP)
                _paste(picture, before, x, y, _LINE)
                _paste(picture, after, x, y + _TILE + _GAP, _TONES[group.tone], frame=3)
        left += group.width + _GROUP_GAP
    for seed in range(seeds):
        y = top + seed * (pair_height + _GROUP_GAP) + _TILE // 2
        draw.text((_MARGIN, y), sides[0], _SOFT, _font(_TEXT_SIZE), "lm")
        draw.text((_MARGIN, y + _TILE + _GAP), sides[1], _INK, _font(_TEXT_SIZE), "lm", stroke_width=0.4)
    for number, line in enumerate(caption_lines):
        draw.text((_MARGIN + _ROW_LABEL, bottom + 16 + number * _LINE_HEIGHT), line, _SOFT, _font(_CAPTION_SIZE), "la")
    return picture


def draw_table(prompts: list[str], rows: dict[str, list[Image.Image]], side: int = 128) -> Image.Image:
    """Draws images of one seed: a row for each model, a column for each prompt.

    Args:
        prompts (`list[str]`): Headings of the columns.
        rows (`dict[str, list[PIL.Image.Image]]`): Label of a row -> its images, one for each prompt.
        side (`int`, defaults to 128): Side of an image in pixels.

    Raises:
        `ValueError`: If there are no prompts or rows, or a row does not have one image for each prompt.
    """
    if not prompts or not rows or any(len(images) != len(prompts) for images in rows.values()):
        raise ValueError(f"rows {', '.join(rows)}: there must be one or more, each with {len(prompts)} images")
    labels = round(max(_font(_CAPTION_SIZE).getlength(name) for name in rows)) + 2 * _GAP
    wrapped = [_wrap(prompt, side, _CAPTION_SIZE) for prompt in prompts]
    top = _MARGIN + max(map(len, wrapped)) * _LINE_HEIGHT + _GAP
    step = side + _GAP
    size = (2 * _MARGIN + labels + len(prompts) * step - _GAP, top + len(rows) * step - _GAP + _MARGIN)
    picture = Image.new("RGB", size, _PAGE)
    draw, left = ImageDraw.Draw(picture), _MARGIN + labels
    for column, lines in enumerate(wrapped):
        middle = left + column * step + side // 2
        for number, text in enumerate(reversed(lines)):
            draw.text((middle, top - _GAP - number * _LINE_HEIGHT), text, _INK, _font(_CAPTION_SIZE), "ms")
    for number, (name, images) in enumerate(rows.items()):
        y = top + number * step
        draw.text((_MARGIN, y + side // 2), name, _INK, _font(_CAPTION_SIZE), "lm")
        for column, image in enumerate(images):
            _paste(picture, image, left + column * step, y, _LINE, side=side)
    return picture


def save_grid(picture: Image.Image, folder: str | Path) -> Path:
    """Writes the image to a folder as `GRID_NAME`, completely or not at all."""
    path = Path(folder) / GRID_NAME
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, format="PNG", optimize=True)
    os.replace(partial, path)
    return path


def _draw_heading(draw: ImageDraw.ImageDraw, group: SampleGroup, prompts: list[list[str]], left: int, top: int):
    colour = _TONES[group.tone]
    draw.text((left, _MARGIN), group.title, colour, _font(_HEADING_SIZE), "la", stroke_width=0.5)
    line = _MARGIN + _HEADING_SIZE + 8
    draw.rectangle((left, line, left + group.width - 1, line + 2), fill=colour)
    for column, lines in enumerate(prompts):
        middle = left + column * (_TILE + _GAP) + _TILE // 2
        for number, text in enumerate(reversed(lines)):
            draw.text((middle, top - 14 - number * _LINE_HEIGHT), text, _INK, _font(_TEXT_SIZE), "ms")


def _paste(
    picture: Image.Image, image: Image.Image, x: int, y: int, colour: str, frame: int = 1, side: int = _TILE
) -> None:
    scale = side / max(image.size)
    tile = to_rgb(image).resize([max(1, round(edge * scale)) for edge in image.size], Image.Resampling.LANCZOS)
    x, y = x + (side - tile.width) // 2, y + (side - tile.height) // 2
    picture.paste(tile, (x, y))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x, y, x + tile.width - 1, y + tile.height - 1), outline=colour, width=frame)
    if tile.getbbox() is None:
        middle = (x + tile.width / 2, y + tile.height / 2)
        draw.multiline_text(middle, "black: hidden by\na safety checker,\nor no image", _SOFT,
                            _font(_CAPTION_SIZE), "mm", align="center")  # fmt: skip


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _wrap(text: str, width: int, size: int = _TEXT_SIZE) -> list[str]:
    """Breaks a text into at most `_MOST_LINES` lines of a width; longer text ends in an ellipsis."""
    font, lines = _font(size), []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"{lines[_MOST_LINES - 1]} ..."]
    return [_shorten(line, width, font) for line in lines] or [""]


def _shorten(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line.rstrip(' .')}..."
