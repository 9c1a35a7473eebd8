"""What an attack is, and those that need nothing but the prompts: other seeds, other words.

An attack turns each prompt into tries. They are drawn in turn until one is a success.
"""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from diffusers import DiffusionPipeline

from ..arguments import typed
from ..generation.generate import GenerationSettings, PromptRow


@dataclass(frozen=True)
class Target:
    """A model under attack.

    Attributes:
        name (`str`): What tables and folders call it.
        pipeline ([`~diffusers.DiffusionPipeline`]): The model; an attack leaves it as it was.
        settings ([`GenerationSettings`]): How it is sampled.
        folder (`Path`): Of the whole run.
        batch_size (`int`): Images at once.
        is_original (`bool`): Whether it is the unerased control, which comes first.
        overwrite (`bool`, defaults to `False`): Whether images and words of another run may be replaced.
    """

    name: str
    pipeline: DiffusionPipeline
    settings: GenerationSettings
    folder: Path
    batch_size: int
    is_original: bool
    overwrite: bool = False


class Attack(ABC):
    """One way to get at what was erased.

    Attributes:
        name (`str`): As the command line and the folders call it.
        label (`str`): As tables show it.
        unit (`str`): What its tries are, as the success curve calls them.
        continues (`bool`): Whether its tries follow on the prompt's own image. If so, a prompt that succeeds without
            the attack is not tried further. If not, the attack is run on it all the same, so that the unerased control
            says whether the attack can work at all.
        facts (`dict`): What decides its tries; fits into JSON.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    unit: ClassVar[str]
    continues: ClassVar[bool] = False

    @property
    @abstractmethod
    def facts(self) -> dict: ...

    @abstractmethod
    def tries(self, row: PromptRow) -> list[PromptRow]:
        """The images for one prompt, in order, under ids of their own."""

    def targets(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        """The prompts that it can attack, its N: all, unless overridden."""
        return list(rows)

    def check(self, rows: Sequence[PromptRow]) -> None:  # noqa: B027
        """Looks at the prompts before any work.

        Raises:
            `ValueError`: If the attack cannot be run on them. Nothing is asked unless overridden.
        """

    @contextmanager
    def on(self, target: Target, rows: Sequence[PromptRow]) -> Iterator[None]:
        """What the model needs while the tries of these prompts are drawn; nothing unless overridden."""
        yield


@typed
class SeedSearch(Attack):
    """The same prompt with other seeds: its own and the following ones.

    Where seeds of a prompt's images are closer than that, tries are as far apart as these seeds reach, so that none
    is tried twice: images of the same seed are no independent tries.

    Args:
        num_seeds (`int`, defaults to 4): Seeds a prompt, with its own; at least 2.

    Raises:
        `ValueError`: If there are fewer.
    """

    name, label, unit = "seeds", "other seeds", "seeds tried at most"
    continues = True

    def __init__(self, num_seeds: int = 4):
        if num_seeds < 2:
            raise ValueError(f"num_seeds {num_seeds}: must be at least 2, the prompt's own and another")
        self.num_seeds, self._step = num_seeds, 1

    @property
    def facts(self) -> dict:
        return {"seeds": self.num_seeds, **({"seeds_apart": self._step} if self._step > 1 else {})}

    def check(self, rows: Sequence[PromptRow]) -> None:
        seeds: dict[str, set[int]] = {}
        for row in rows:
            seeds.setdefault(row.prompt, set()).add(row.seed)
        reaches = [
            max(own) - min(own) + 1
            for own in seeds.values()
            if any(b - a < self.num_seeds for a, b in pairwise(sorted(own)))
        ]
        self._step = max(reaches, default=1)

    def tries(self, row: PromptRow) -> list[PromptRow]:
        return [
            replace(row, id=f"{row.id}-seed{number}", seed=(row.seed + number * self._step) % 2**64)
            for number in range(1, self.num_seeds)
        ]


class Paraphrases(Attack):
    """Other words for the prompts, or other languages, with the prompts' own seeds.

    Args:
        wordings (`dict[str, list[str]]`): Prompt -> its paraphrases, at least one; see [`read_paraphrases`].
        source (`str`, *optional*): Where they are from, for the record.
    """

    name, label, unit = "paraphrases", "paraphrases", "paraphrases tried at most"

    def __init__(self, wordings: dict[str, list[str]], source: str = "given in Python"):
        self.wordings, self.source = wordings, source
        self._left_out: int | None = None

    @property
    def facts(self) -> dict:
        told = {"source": self.source, "paraphrases": sum(map(len, self.wordings.values()))}
        return told | ({"of prompts not attacked": self._left_out} if self._left_out else {})

    def check(self, rows: Sequence[PromptRow]) -> None:
        prompts = {row.prompt.strip() for row in rows}
        if missing := [prompt for prompt in dict.fromkeys(row.prompt.strip() for row in rows)
                       if not self.wordings.get(prompt)]:  # fmt: skip
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"paraphrases {self.source}: has none of the prompt '{missing[0]}'{more}")
        self._left_out = sum(len(texts) for prompt, texts in self.wordings.items() if prompt not in prompts)

    def tries(self, row: PromptRow) -> list[PromptRow]:
        texts = self.wordings[row.prompt.strip()]
        return [replace(row, id=f"{row.id}-text{number}", prompt=text) for number, text in enumerate(texts, 1)]


def read_paraphrases(path: str | Path) -> dict[str, list[str]]:
    """Prompt -> paraphrases, from a `.csv` or `.jsonl` file with the columns `prompt` and `paraphrase`, a paraphrase a
    row. Each counts once, and the prompt itself is none.

    Raises:
        `ValueError`: If the file cannot be read, lacks a column, holds no row, or a row has a blank.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"paraphrases {path}: must be a .csv or .jsonl file")
    try:
        entries = readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"paraphrases {path}: cannot be read ({reason})") from None
    if not entries:
        raise ValueError(f"paraphrases {path}: holds no rows")
    wordings: dict[str, list[str]] = {}
    for number, entry in enumerate(entries, 1):
        texts = []
        for column in ("prompt", "paraphrase"):
            if not isinstance(entry, dict) or column not in entry:
                raise ValueError(f"paraphrases {path}: row {number} has no column '{column}'")
            if not isinstance(entry[column], str) or not entry[column].strip():
                raise ValueError(f"paraphrases {path}: row {number} has no text in the column '{column}'")
            texts.append(entry[column].strip())
        known = wordings.setdefault(texts[0], [])
        if texts[1] not in (texts[0], *known):
            known.append(texts[1])
    return wordings


def _csv_rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file, strict=True))


def _json_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
