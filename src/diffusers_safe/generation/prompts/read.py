"""Reads prompts from any source into the rows of an evaluation."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...arguments import typed
from ...values import choose
from ..generate import PromptRow, check_rows
from .checks import report_missing_seeds, report_renamed, report_repeated, report_unused, with_prompts
from .columns import find_column, given, number_in, setting_columns, text_of
from .layouts import CASE_NUMBER, CATEGORIES, LAYOUTS, NUMBERS, Layout, column_key, is_index
from .sources import ENDINGS, check_template, fill, is_file, is_source, read_records


PROMPT_COLUMN = "prompt"
MAX_IMAGES = 10**7  # of one list: a hundred times as many as the largest published lists have
SUBJECT = "subject"  # label with the text that a template was filled with
TEXTS = "prompts"  # name of the source in messages, if the prompts themselves are given
# The name of a file in a format that is not supported, whether it exists or not.
_OTHER_FILES = re.compile(
    r"\S+\.(xlsx?|ods|numbers|arrow|feather|pkl|pickle|npz|npy|zip|gz|db|sqlite3?|docx?|pdf|html?)", re.IGNORECASE
)


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
    """Reads a list of prompts into rows of images to generate.

    The id of an image consists of the number of its row in the source and the prompt, or of a column that names the
    row, and of the number of the image. An image therefore keeps its id and seed whatever part of the source is used.

    The seed, guidance scale and size of a row are read from columns that are known to hold them (`SETTINGS`). Rows of
    a file or dataset without a prompt are left out. These rows, columns that look like a setting and are not used, and
    rows that give the same image are reported as warnings.

    Args:
        source (`str`, `Path` or `list[str]`): Prompts, or one of

            * a table: `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`;
            * a `.txt` file with one prompt in each line; empty lines and lines that begin with `#` are skipped;
            * a `.yaml` file with a `template:` such as `"An image of {object} in {theme} style."` and a list of words
              for each of its fields: every combination, with the words as labels;
            * the folder of a dataset, or the id `user/name` of a dataset on the Hugging Face Hub.
        layout (`str`, *optional*): A name of `LAYOUTS`. Default: the first whose columns exist.
        prompt_column (`str`, defaults to `"prompt"`): Name of the column with the prompts.
        prompt_template (`str`, *optional*): Text around each prompt, such as `"{} body"`; `{name}` inserts a column.
            The prompt without it is kept as the label `subject`.
        categories (`list[str]`, *optional*): Use only rows of at least one of these categories.
        max_prompts (`int`, *optional*): Use only this number of prompts, a fixed sample of the whole source. The
            sample of a smaller number is part of that of a larger one.
        images_per_prompt (`int`, defaults to 1): Images of each prompt, with consecutive seeds.
        seed (`int`, defaults to 0): Seed of the first image of a prompt, unless the source has one.
        row_settings (`bool`, defaults to `True`): Use the guidance scale and size of the rows.
        dataset_config_name (`str`, *optional*): Configuration of a dataset on the Hub.
        split (`str`, *optional*): Split of a dataset. Default: `"train"`.

    Returns:
        `list[PromptRow]`: In the order of the source. Labels are the source's other columns, `categories` as a list.

    Raises:
        `ValueError`: If there is nothing to read, a column or layout does not exist, the id of a row is not a file
            name, or a value is not a number.
    """
    if layout is not None:
        layout = choose("layout", layout, LAYOUTS)
    for name, value in (("max_prompts", max_prompts), ("images_per_prompt", images_per_prompt)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    if prompt_template is not None:
        check_template(prompt_template, "prompt_template")
    where, records = _records(source, prompt_column, dataset_config_name, split)
    columns = list(dict.fromkeys(name for record in records for name in record))
    prompt_column = _prompt_column(prompt_column, where, columns)
    layout_columns = _layout(layout, where, columns).names
    settings = setting_columns(columns)
    names_column = next(filter(None, (find_column(name, columns) for name in layout_columns)), None)
    names = _names(records, names_column, where)
    report_unused(where, records, columns, settings, row_settings)
    numbered = list(enumerate(records))
    if where != TEXTS:
        numbered = with_prompts(numbered, prompt_column, where)
    numbered = _selected(numbered, categories, max_prompts, where)
    if (count := len(numbered) * images_per_prompt) > MAX_IMAGES:
        raise ValueError(
            f"images_per_prompt {images_per_prompt}: with {len(numbered):,} prompts these are {count:,} images; "
            f"at most {MAX_IMAGES:,} are allowed"
        )
    rows, numbers = [], []
    for number, record in numbered:
        try:
            text, labels = _prompt(record, prompt_column, prompt_template, settings)
            first = PromptRow(
                names[number] or _slug(number, text), text, _seed(record, settings, seed), labels,
                **(_own_settings(record, settings) if row_settings else {}),
            )  # fmt: skip
            rows += [_image(first, image) for image in range(images_per_prompt)]
        except ValueError as error:
            raise ValueError(f"{where}, row {number + 1}: {error}") from None
        numbers += [number + 1] * images_per_prompt
    check_rows(rows)
    report_missing_seeds(where, numbered, settings["seed"], seed)
    report_repeated(where, rows, numbers)
    return rows


def _records(
    source: str | Path | list[str], prompt_column: str, config_name: str | None, split: str | None
) -> tuple[str, list[dict]]:
    """The name of the source for messages, and its rows."""
    texts = [str(source)] if isinstance(source, (str, Path)) else list(source)
    if len(texts) == 1 and (isinstance(source, Path) or is_source(texts[0])):
        return texts[0], read_records(texts[0], prompt_column, config_name, split)
    if files := [text for text in texts if is_file(text)]:
        raise ValueError(f"prompts {files[0]}: a file must be the only one")
    if files := [text for text in texts if os.path.isfile(text) or _OTHER_FILES.fullmatch(text)]:
        raise ValueError(f"prompts {files[0]}: a file in an unknown format; allowed are {', '.join(ENDINGS)}")
    if not texts:
        raise ValueError("prompts: none given")
    return TEXTS, [{prompt_column: text} for text in texts]


def _prompt_column(name: str, where: str, columns: Sequence[str]) -> str:
    alike = [column for column in columns if column_key(column) == column_key(name)]
    if name not in columns and len(alike) > 1:
        raise ValueError(f"{where}: several columns are called '{name}': {', '.join(alike)}; leave one")
    if (found := find_column(name, columns)) is None:
        there = ", ".join(f"{column:.40}" for column in columns if not is_index(column))
        raise ValueError(
            f"{where}: no column '{name}', only {there}; name the column with prompt_column, or give a file without a"
            " header as .txt"
        )
    return found


def _layout(name: str | None, where: str, columns: Sequence[str]) -> Layout:
    missing = {
        name: [column for column in layout.known_by if find_column(column, columns) is None]
        for name, layout in LAYOUTS.items()
    }
    if name is None:
        name = next(name for name, columns in missing.items() if not columns)
    elif missing[name]:
        raise ValueError(
            f"{where}: layout '{name}' needs the column '{missing[name][0]}'; it has {', '.join(columns)}"
        )
    return LAYOUTS[name]


def _names(records: Sequence[dict], column: str | None, where: str) -> list[str | None]:
    """The names of the rows in a column. The second row with a name, ignoring case, gets `"-2"`. Case numbers are read
    as `pandas` does, without leading zeros, because other programs name their images this way."""
    names = [None if (value := given(record, column)) is None else text_of(value) for record in records]
    if column is not None and column_key(column) == column_key(CASE_NUMBER):
        names = [name and name.removesuffix(".0") for name in names]
        if all(name.isdecimal() for name in names if name):
            names = [name and (name.lstrip("0") or "0") for name in names]
    # They become file names, and many file systems ignore case.
    taken, counts, renamed = {name.casefold() for name in names if name}, Counter(), []
    for number, name in enumerate(names):
        if name is None:
            continue
        key = name.casefold()
        counts[key] += 1
        if counts[key] > 1:
            while f"{key}-{counts[key]}" in taken:
                counts[key] += 1
            names[number] = f"{name}-{counts[key]}"
            taken.add(names[number].casefold())
            renamed.append((number + 1, names[number]))
    report_renamed(where, column, renamed)
    return names


def _selected(
    numbered: list[tuple[int, dict]], categories: list[str] | None, max_prompts: int | None, where: str
) -> list[tuple[int, dict]]:
    """The rows of the categories, and of these a fixed sample of `max_prompts`, in their order."""
    if categories:
        numbered = _of_categories(numbered, categories, where)
    if max_prompts is not None:
        numbered = sorted(sorted(numbered, key=_rank)[:max_prompts], key=lambda entry: entry[0])
    return numbered


def _of_categories(numbered: list[tuple[int, dict]], wanted: list[str], where: str) -> list[tuple[int, dict]]:
    found = {number: _categories(record) for number, record in numbered}
    known = {name.lower(): None for names in found.values() for name in names}
    for name in wanted:
        if name.lower() not in known:
            allowed = ", ".join(known) or "none, as the source has no categories"
            raise ValueError(f"{where}: category '{name}': unknown; allowed are {allowed}")
    keep = {name.lower() for name in wanted}
    return [(number, record) for number, record in numbered if keep & {name.lower() for name in found[number]}]


def _categories(record: dict) -> list[str]:
    value = given(record, CATEGORIES)
    names = value if isinstance(value, list) else [] if value is None else str(value).split(",")
    return [text for name in names if name is not None and (text := str(name).strip())]


def _rank(entry: tuple[int, dict]) -> str:
    return hashlib.sha256(str(entry[0]).encode()).hexdigest()


def _prompt(
    record: dict, prompt_column: str, template: str | None, settings: dict[str, list[str]]
) -> tuple[str, dict]:
    """The prompt and the labels of a row."""
    prompt = record.get(prompt_column)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{prompt_column} {prompt!r}: must be a text that is not blank")
    labels = _labels(record, {prompt_column, *(column for columns in settings.values() for column in columns)})
    if template is None:
        return prompt, labels
    values = {name: value for name, value in record.items() if value not in (None, "")}
    return fill(template, values, prompt), {**labels, SUBJECT: prompt}


def _slug(number: int, prompt: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-")
    return f"{number:05}-{slug}".rstrip("-")


def _seed(record: dict, settings: dict[str, list[str]], otherwise: int) -> int:
    own = _first_number(record, settings["seed"], int)
    return otherwise if own is None else own


def _own_settings(record: dict, settings: dict[str, list[str]]) -> dict[str, float | int | None]:
    kinds = {"guidance_scale": float, "height": int, "width": int}
    return {name: _first_number(record, settings[name], kind) for name, kind in kinds.items()}


def _first_number(record: dict, columns: Sequence[str], kind: type) -> float | int | None:
    return next((number for c in columns if (number := number_in(record, c, kind)) is not None), None)


def _image(first: PromptRow, image: int) -> PromptRow:
    settings = {name: getattr(first, name) for name in ("guidance_scale", "height", "width")}
    return PromptRow(f"{first.id}_{image}", first.prompt, first.seed + image, first.labels, **settings)


def _labels(record: dict, used: set[str]) -> dict:
    labels = {}
    for name, value in record.items():
        if name in used or is_index(name) or given(record, name) is None:
            continue
        if name == CATEGORIES:
            labels[name] = _categories(record)
        elif name in NUMBERS and (number := _number_or_none(record, name)) is not None:
            labels[name] = number
        elif isinstance(value, (str, int, float, bool, list, dict)):
            labels[name] = value
        else:
            labels[name] = str(value)
    return labels


def _number_or_none(record: dict, column: str) -> float | None:
    try:
        return number_in(record, column, float)
    except ValueError:
        return None
