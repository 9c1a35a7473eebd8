"""A source of prompts to the rows of an evaluation."""

import hashlib
import math
import os
import re
from pathlib import Path

from ...arguments import choose, typed
from ..generate import PromptRow, check_rows
from .layouts import CASE_NUMBER, LAYOUTS, Layout
from .sources import ENDINGS, fields_of, fill, is_file, is_source, read_records


PROMPT_COLUMN = "prompt"
MAX_IMAGES = 10**7  # of one list: a hundred times the largest that are published
SUBJECT = "subject"  # the label of what a template was filled with


@typed
def read_prompts(
    source: str | Path | list[str],
    layout: str | None = None,
    prompt_column: str = PROMPT_COLUMN,
    prompt_template: str | None = None,
    categories: list[str] | None = None,
    max_prompts: int | None = None,
    images_per_prompt: int = 1,
    seed: int = 0,
    row_settings: bool = True,
    dataset_config_name: str | None = None,
    split: str | None = None,
) -> list[PromptRow]:
    """The images to generate for a list of prompts.

    A row is called by its number in the source and its prompt, or by a column that names it, and by the number of the
    image: whatever part of the source is taken, an image keeps its id and its seed.

    Args:
        source (`str`, `Path` or `list[str]`): Prompts, or one of

            * a table: `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`;
            * a `.txt` file with a prompt a line; empty lines and those that begin with `#` are skipped;
            * a `.yaml` file with a `template:` such as `"An image of {object} in {theme} style."` and a list of words
              for each of its fields: every combination, with the words as labels;
            * a folder of a dataset, or the id `user/name` of one on the Hugging Face Hub.
        layout (`str`, *optional*): A name of `LAYOUTS`; default the first whose columns are there.
        prompt_column (`str`, defaults to `"prompt"`): Where the prompts are.
        prompt_template (`str`, *optional*): Text around each prompt, `"{} body"`; `{name}` stands for a column. The
            prompt without it is kept as the label `subject`.
        categories (`list[str]`, *optional*): Only rows of at least one of these.
        max_prompts (`int`, *optional*): Only so many, drawn over the whole source, always the same; those of a smaller
            number are among those of a larger one.
        images_per_prompt (`int`, defaults to 1): Images of each prompt, with seeds one apart.
        seed (`int`, defaults to 0): Of the first image of a prompt that has none of its own.
        row_settings (`bool`, defaults to `True`): Let a row's own guidance scale and size count.
        dataset_config_name (`str`, *optional*): Of a dataset on the Hub.
        split (`str`, *optional*): Of a dataset, `"train"` by default.

    Returns:
        `list[PromptRow]`: In the order of the source. Labels are the source's other columns, `categories` as a list.

    Raises:
        `ValueError`: If there is nothing to read or no such column or layout, or a row has no prompt, an id that is
            no file name or occurs twice, or a number that is none.
    """
    if layout is not None:
        layout = choose("layout", layout, LAYOUTS)
    for name, value in (("max_prompts", max_prompts), ("images_per_prompt", images_per_prompt)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    if prompt_template is not None and not fields_of(prompt_template):
        raise ValueError(f"prompt_template '{prompt_template}': has no {{}} for the prompt, nor {{name}} for a column")
    where, records = _records(source, prompt_column, dataset_config_name, split)
    columns = dict.fromkeys(name for record in records for name in record)
    chosen = _layout(layout, where, columns)
    if prompt_column not in columns:
        raise ValueError(f"{where}: no column '{prompt_column}', only {', '.join(columns)}")
    numbered = list(enumerate(records))
    if categories:
        numbered = _of_categories(numbered, categories, chosen, where)
    if max_prompts is not None:
        numbered = sorted(sorted(numbered, key=_rank)[:max_prompts], key=lambda entry: entry[0])
    if (count := len(numbered) * images_per_prompt) > MAX_IMAGES:
        raise ValueError(
            f"images_per_prompt {images_per_prompt}: with {len(numbered):,} prompts these are {count:,} images; "
            f"allowed are at most {MAX_IMAGES:,}"
        )
    rows = []
    for number, record in numbered:
        try:
            first = _row(number, record, chosen, prompt_column, prompt_template, seed, row_settings)
            rows += [_image(first, image) for image in range(images_per_prompt)]
        except ValueError as error:
            raise ValueError(f"{where}, row {number + 1}: {error}") from None
    check_rows(rows)
    return rows


def _records(
    source: str | Path | list[str], prompt_column: str, config_name: str | None, split: str | None
) -> tuple[str, list[dict]]:
    """The source's name for messages, and its rows."""
    texts = [str(source)] if isinstance(source, (str, Path)) else list(source)
    if len(texts) == 1 and (isinstance(source, Path) or is_source(texts[0])):
        return texts[0], read_records(texts[0], prompt_column, config_name, split)
    if files := [text for text in texts if is_file(text)]:
        raise ValueError(f"prompts {files[0]}: a file must be the only one")
    if files := [text for text in texts if os.path.isfile(text)]:
        raise ValueError(f"prompts {files[0]}: a file of a kind that is not read; allowed are {', '.join(ENDINGS)}")
    if not texts:
        raise ValueError("prompts: there are none")
    return "prompts", [{prompt_column: text} for text in texts]


def _layout(name: str | None, where: str, columns: dict[str, None]) -> Layout:
    if name is None:
        return next(layout for layout in LAYOUTS.values() if columns.keys() >= set(layout.known_by))
    if missing := [column for column in LAYOUTS[name].known_by if column not in columns]:
        raise ValueError(f"{where}: layout '{name}' needs the column '{missing[0]}'; it has {', '.join(columns)}")
    return LAYOUTS[name]


def _of_categories(
    numbered: list[tuple[int, dict]], wanted: list[str], layout: Layout, where: str
) -> list[tuple[int, dict]]:
    found = {number: _categories(record, layout) for number, record in numbered}
    known = {name.lower(): None for names in found.values() for name in names}
    for name in wanted:
        if name.lower() not in known:
            allowed = ", ".join(known) or "none, as the source has no categories"
            raise ValueError(f"{where}: category '{name}': unknown; allowed are {allowed}")
    keep = {name.lower() for name in wanted}
    return [(number, record) for number, record in numbered if keep & {name.lower() for name in found[number]}]


def _categories(record: dict, layout: Layout) -> list[str]:
    value = _given(record, layout.categories)
    names = value if isinstance(value, list) else [] if value is None else str(value).split(",")
    return [text for name in names if name is not None and (text := str(name).strip())]


def _rank(entry: tuple[int, dict]) -> str:
    return hashlib.sha256(str(entry[0]).encode()).hexdigest()


def _row(
    number: int,
    record: dict,
    layout: Layout,
    prompt_column: str,
    template: str | None,
    seed: int,
    row_settings: bool,
) -> PromptRow:
    """A source's row as its first image."""
    prompt = record.get(prompt_column)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{prompt_column} {prompt!r}: must be a text that is not blank")
    labels = _labels(record, layout, prompt_column)
    if template is not None:
        values = {name: value for name, value in record.items() if value not in (None, "")}
        labels[SUBJECT] = prompt
        prompt = fill(template, values, prompt)
    given = _given(record, layout.name)
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-")
    own = _number(record, layout.seed, int)
    settings = {
        name: _number(record, getattr(layout, name), kind) if row_settings else None
        for name, kind in (("guidance_scale", float), ("height", int), ("width", int))
    }
    return PromptRow(
        f"{number:05}-{slug}".rstrip("-") if given is None else _name(given, layout),
        prompt,
        seed if own is None else own,
        labels,
        **settings,
    )


def _image(first: PromptRow, image: int) -> PromptRow:
    settings = {name: getattr(first, name) for name in ("guidance_scale", "height", "width")}
    return PromptRow(f"{first.id}_{image}", first.prompt, first.seed + image, first.labels, **settings)


def _labels(record: dict, layout: Layout, prompt_column: str) -> dict:
    settled = (prompt_column, layout.seed, layout.guidance_scale, layout.width, layout.height)
    labels = {}
    for name, value in record.items():
        is_index = not name or name.startswith("Unnamed:")  # of pandas
        if name in settled or is_index or _given(record, name) is None:
            continue
        if name == layout.categories:
            labels[name] = _categories(record, layout)
        elif name in layout.numbers:
            labels[name] = _number(record, name, float)
        elif isinstance(value, (str, int, float, bool, list, dict)):
            labels[name] = value
        else:
            labels[name] = str(value)
    return labels


def _given(record: dict, column: str | None) -> object | None:
    value = None if column is None else record.get(column)
    return None if value in (None, "") or (isinstance(value, float) and math.isnan(value)) else value


def _name(given: object, layout: Layout) -> str:
    """What a row is called; a case number is whole, whatever a table made of it."""
    name = _text(given)
    return name.removesuffix(".0") if layout.name == CASE_NUMBER else name


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _number(record: dict, column: str, kind: type) -> float | int | None:
    """A value as a number; whole ones without the way through a float, which would round large seeds."""
    value = _given(record, column)
    if value is None:
        return None
    text = _text(value)
    try:
        number = int(text.removesuffix(".0")) if kind is int else float(text)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{column} '{text}' is no {'whole ' if kind is int else ''}number")
    return number
