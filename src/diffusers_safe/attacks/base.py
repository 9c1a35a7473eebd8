"""The base class of attacks, and the attacks that need only prompts: other seeds, other words.

An attack turns each prompt into attempts, which are generated in turn until one succeeds.
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
from ..generation.rows import GenerationSettings, PromptRow
from ..progress import ProgressCallback


@dataclass(frozen=True)
class Target:
    """A model under attack.

    Attributes:
        name (`str`): Name of the model in tables and folders.
        pipeline ([`~diffusers.DiffusionPipeline`]): The model; after an attack it is unchanged.
        settings ([`GenerationSettings`]): Sampling settings.
        folder (`Path`): Output folder of the whole run.
        batch_size (`int`): Number of images generated at once.
        is_original (`bool`): Whether it is the unerased control, which comes first.
        overwrite (`bool`, defaults to `False`): Whether images and learned tokens of another run may be replaced.
        callback (`Callable[[Progress], None]`, *optional*): Receives the progress of the run.
    """

    name: str
    pipeline: DiffusionPipeline
    settings: GenerationSettings
    folder: Path
    batch_size: int
    is_original: bool
    overwrite: bool = False
    callback: ProgressCallback | None = None


class Attack(ABC):
    """A way to bring back an erased concept.

    Attributes:
        name (`str`): Name on the command line and of folders.
        label (`str`): Name in tables.
        unit (`str`): What its attempts are, as label of the success curve.
        continues (`bool`): Whether its attempts continue those of the prompt itself. If so, a prompt that succeeds
            without the attack is not attacked. If not, it is attacked as well, so that the unerased control shows
            whether the attack can work at all.
        facts (`dict`): What determines its attempts, as JSON values.
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
        """The attempts on one prompt, in order, each with its own id."""

    def targets(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        """The prompts that it can attack, its N. Default: all."""
        return list(rows)

    def check(self, rows: Sequence[PromptRow]) -> None:  # noqa: B027
        """Checks the prompts before any work. Default: accepts all.

        Raises:
            `ValueError`: If the attack cannot be run on them.
        """

    @contextmanager
    def on(self, target: Target, rows: Sequence[PromptRow]) -> Iterator[None]:
        """A context in which the attempts on these prompts are generated. Default: changes nothing."""
        yield


@typed
class SeedSearch(Attack):
    """The same prompt with other seeds: its own and the following ones.

    If several images of a prompt have seeds that are closer together, attempts use larger steps between seeds, so that
    no seed is used twice: images of the same seed are not independent attempts.

    Args:
        num_seeds (`int`, defaults to 4): Number of seeds for each prompt, including its own; at least 2.

    Raises:
        `ValueError`: If `num_seeds` is below 2.
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
    """Paraphrases or translations of the prompts, with the prompts' own seeds.

    Args:
        wordings (`dict[str, list[str]]`): Prompt -> its paraphrases, at least one; see [`read_paraphrases`].
        source (`str`, *optional*): Source of the paraphrases, for the record.
    """

    name, label, unit = "paraphrases", "paraphrases", "paraphrases tried at most"

    def __init__(self, wordings: dict[str, list[str]], source: str = "given in Python"):
        self.wordings, self.source = wordings, source
        self._left_out: int | None = None

    @property
    def facts(self) -> dict:
        facts = {"source": self.source, "paraphrases": sum(map(len, self.wordings.values()))}
        return facts | ({"of prompts not attacked": self._left_out} if self._left_out else {})

    def check(self, rows: Sequence[PromptRow]) -> None:
        prompts = {row.prompt.strip() for row in rows}
        if missing := [prompt for prompt in dict.fromkeys(row.prompt.strip() for row in rows)
                       if not self.wordings.get(prompt)]:  # fmt: skip
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"paraphrases {self.source}: has no paraphrase of the prompt '{missing[0]}'{more}")
        self._left_out = sum(len(texts) for prompt, texts in self.wordings.items() if prompt not in prompts)

    def tries(self, row: PromptRow) -> list[PromptRow]:
        texts = self.wordings[row.prompt.strip()]
        return [replace(row, id=f"{row.id}-text{number}", prompt=text) for number, text in enumerate(texts, 1)]


def read_paraphrases(path: str | Path) -> dict[str, list[str]]:
    """Reads paraphrases from a `.csv` or `.jsonl` file with the columns `prompt` and `paraphrase`, one paraphrase in
    each row. Duplicates and paraphrases that equal their prompt are dropped.

    Returns:
        `dict[str, list[str]]`: Prompt -> paraphrases.

    Raises:
        `ValueError`: If the file cannot be read, lacks a column, has no rows, or a value is blank.
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
        raise ValueError(f"paraphrases {path}: has no rows")
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
