"""What to erase: reading lists of concepts, and the order in which several are trained."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .arguments import choose, note, typed


CONCEPT_SCHEDULES = ("iterative", "random", "composite", "sequential")
PROMPT_ORDERS = ("paper", "repository", "matched")
_OTHER_FILE = re.compile(r"\S+\.(csv|tsv|jsonl?|ya?ml|parquet|xlsx?|md|docx?|pdf)", re.IGNORECASE)
_SEPARATORS = re.compile(r"[,;|/、，；]|\s(?:and|or|&)\s")


@typed
def read_concepts(values: list[str], name: str = "concepts") -> list[str]:
    """Reads `--concepts` and other lists of names or prompts: each is itself, or a `.txt` file with one a line.

    In a file, empty lines and lines that start with `#` are skipped. What is given several times is kept once, and a
    note says so; another says where a name looks like several (a comma, "and"), since it is one concept.

    Args:
        values (`list[str]`): `["Van Gogh", "Claude Monet"]` or `["artists.txt"]`.
        name (`str`, defaults to `"concepts"`): The option, for messages. Commas are expected in those whose name ends
            with `prompts`.

    Returns:
        `list[str]`: At least one, none of them blank.

    Raises:
        `ValueError`: If the list or a file is empty, an entry is blank, holds a line break or is a list in brackets,
            or a file does not exist.
    """
    found = []
    for value in values:
        if _OTHER_FILE.fullmatch(value.strip()):
            raise ValueError(f"{name} {value:.200}: a file of a kind that is not read; write a .txt file, one a line")
        found += _read_lines(Path(value), name) if value.strip().lower().endswith(".txt") else [value.strip()]
    if not found or not all(map(_is_visible, found)):
        raise ValueError(f"{name} {list(values)!r:.200}: give at least one {_entry(name)}, and none that is blank")
    kept = {}
    for entry in found:
        kept.setdefault(" ".join(entry.split()).casefold(), entry)
    if len(kept) < len(found):
        counts = Counter(" ".join(entry.split()).casefold() for entry in found)
        repeated = [f"'{kept[key]:.80}' ({count} times)" for key, count in counts.items() if count > 1]
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        note("%s: given several times, used once: %s", name, ", ".join(repeated[:5]) + more)
    for entry in kept.values():
        if "\n" in entry or (entry.startswith("[") and entry.endswith("]")):
            raise ValueError(f"{name} {entry!r:.200}: is a list in one text; give each {_entry(name)} by itself")
        if not name.endswith("prompts") and len(parts := _SEPARATORS.split(entry)) > 1:
            separate = " ".join(f'"{part.strip()}"' for part in parts if part.strip())
            note('%s: "%s" is one concept; for %d of them write --%s %s', name, entry, len(parts), name, separate)
    return list(kept.values())


def _read_lines(path: Path, name: str) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{name} file {path}: no such file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} file {path}: cannot be read as UTF-8 text ({error})") from None
    if not (entries := [line for line in lines if line and not line.startswith("#")]):
        raise ValueError(f"{name} file {path}: holds no {_entry(name)}; write one a line")
    return entries


def _is_visible(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)


def _entry(name: str) -> str:
    return "prompt" if name.endswith("prompts") else "concept"


def names_concept(prompt: str, concept: str) -> bool:
    """Whether a prompt has a concept's words in it: whole words in a row, in whatever case, singular or plural."""
    words, sought = _words(prompt), _words(concept)
    return bool(sought) and any(
        all(map(_same_word, words[start : start + len(sought)], sought))
        for start in range(len(words) - len(sought) + 1)
    )


@lru_cache(4096)
def _words(text: str) -> tuple[str, ...]:
    """Words and single symbols; `Van_Gogh` and `van-gogh` are two words."""
    return tuple(re.findall(r"[^\W_]+|[^\w\s-]", unicodedata.normalize("NFKC", text).casefold()))


def _same_word(first: str, second: str) -> bool:
    return first == second or first in _singulars(second) or second in _singulars(first)


@lru_cache(4096)
def _singulars(word: str) -> frozenset[str]:
    """What a word may be the plural of."""
    endings = {"s": ("",), "es": ("",), "ies": ("y",), "ves": ("f", "fe"), "men": ("man",), "children": ("child",)}
    return frozenset(
        word.removesuffix(plural) + singular
        for plural, singulars in endings.items()
        if word.endswith(plural) and len(word) > 3 and not word.endswith(("ss", "us", "is"))
        for singular in singulars
    )


@lru_cache
def naming_pattern(concepts: tuple[str, ...]) -> re.Pattern:
    """Finds these concepts in captions as they are written, as whole words in whatever case; for many captions."""
    names = "|".join(map(re.escape, concepts))
    return re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE)


def joined(concepts: list[str]) -> str:
    """All concepts in one prompt, as SDD writes them: `"knife, gun, bomb"`."""
    return ", ".join(concepts)


@typed
@dataclass(frozen=True)
class ConceptSchedule:
    """Which prompts a training sample uses: one to draw its latent, one to train on.

    "One concept" below is, by `schedule`:

    * `"iterative"`: each in turn, from sample to sample (SDD's paper);
    * `"random"`: uniform;
    * `"composite"`: always all of them, joined with commas;
    * `"sequential"`: a continual schedule, the first for an equal share of the samples, then the second, and so on;
      the concepts still to come are unknown to it, so "all joined" is the one concept, too.

    By `prompt_order`, SDD's paper draws latents with one concept and trains on all joined (`"paper"`); its repository
    draws with all joined and trains on one (`"repository"`); `"matched"` uses the one concept for both. With a single
    concept they are the same.

    Attributes:
        concepts (`list[str]`): One or more.
        schedule (`str`, defaults to `"iterative"`): One of `CONCEPT_SCHEDULES`.
        prompt_order (`str`, defaults to `"paper"`): One of `PROMPT_ORDERS`.
        num_samples (`int`, *optional*): Samples of the whole run; only `"sequential"` needs it.
    """

    concepts: list[str]
    schedule: str = "iterative"
    prompt_order: str = "paper"
    num_samples: int | None = None

    def __post_init__(self):
        if not self.concepts:
            raise ValueError("concepts: the list is empty; give at least one concept")
        object.__setattr__(self, "schedule", choose("concept_schedule", self.schedule, CONCEPT_SCHEDULES))
        object.__setattr__(self, "prompt_order", choose("prompt_order", self.prompt_order, PROMPT_ORDERS))
        if self.schedule == "sequential" and not self.num_samples:
            raise ValueError("concept_schedule 'sequential' needs num_samples, the samples of the whole run")

    def prompts(self, index: int, generator: torch.Generator) -> tuple[str, str]:
        """The prompt that draws the latent of sample `index` (counted from 0 over the whole run), and the one it
        trains on."""
        one = self._one_concept(index, generator)
        together = one if self.schedule == "sequential" else joined(self.concepts)
        if self.prompt_order == "paper":
            return one, together
        if self.prompt_order == "repository":
            return together, one
        return one, one

    def _one_concept(self, index: int, generator: torch.Generator) -> str:
        count = len(self.concepts)
        if self.schedule == "iterative":
            return self.concepts[index % count]
        if self.schedule == "random":
            return self.concepts[int(torch.randint(count, (), generator=generator))]
        if self.schedule == "sequential":
            return self.concepts[min(index * count // self.num_samples, count - 1)]
        return joined(self.concepts)

    def all_prompts(self) -> list[str]:
        """Every prompt that `prompts` can return."""
        singles = [] if self.schedule == "composite" else self.concepts
        joins = self.schedule == "composite" or (self.schedule != "sequential" and self.prompt_order != "matched")
        return list(dict.fromkeys([*singles, *([joined(self.concepts)] if joins else [])]))
