"""Lists of concepts, how to find them in prompts, and the order in which several concepts are trained."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .arguments import typed
from .messages import note
from .values import choose


CONCEPT_SCHEDULES = ("iterative", "random", "composite", "sequential")
PROMPT_ORDERS = ("paper", "repository", "matched")
_OTHER_FILE = re.compile(r"\S+\.(csv|tsv|jsonl?|ya?ml|parquet|xlsx?|md|docx?|pdf)", re.IGNORECASE)
_SEPARATORS = re.compile(r"[,;|/、，；]|\s(?:and|or|&)\s")


@typed
def read_concepts(values: list[str], name: str = "concepts") -> list[str]:
    """Reads `--concepts` and other lists of names or prompts.

    An entry is a name, or a `.txt` file with one name per line, in which empty lines and lines that start with `#` are
    skipped. Duplicates are used once, with a note. Another note is logged if a name looks like several ("a, b",
    "a and b"), because it is a single concept.

    Args:
        values (`list[str]`): Entries, such as `["Van Gogh", "Claude Monet"]` or `["artists.txt"]`.
        name (`str`, defaults to `"concepts"`): Name of the option, for messages. Entries of options whose name ends
            with `prompts` may contain commas.

    Returns:
        `list[str]`: At least one name; none is blank.

    Raises:
        `ValueError`: If the list or a file is empty, an entry is blank, contains a line break or a null character
            or is a list in brackets, or a file does not exist.
    """
    found = [entry for value in values for entry in _read_entries(value, name)]
    if not found or not all(map(is_visible, found)):
        raise ValueError(f"{name} {list(values)!r:.200}: give at least one {_entry(name)}, and no blank one")
    entries = _without_duplicates(found, name)
    for entry in entries:
        _check_entry(entry, name)
    return entries


def _read_entries(value: str, name: str) -> list[str]:
    if _OTHER_FILE.fullmatch(value.strip()):
        raise ValueError(f"{name} {value:.200}: this kind of file is not supported; use a .txt file with one per line")
    return _read_lines(Path(value), name) if value.strip().lower().endswith(".txt") else [value.strip()]


def _without_duplicates(found: list[str], name: str) -> list[str]:
    """The first of all entries that differ only in case or spaces."""
    kept, counts = {}, Counter()
    for entry in found:
        key = " ".join(entry.split()).casefold()
        kept.setdefault(key, entry)
        counts[key] += 1
    if len(kept) < len(found):
        repeated = [f"'{kept[key]:.80}' ({count} times)" for key, count in counts.items() if count > 1]
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        note("%s: duplicates are used once: %s", name, ", ".join(repeated[:5]) + more)
    return list(kept.values())


def _check_entry(entry: str, name: str) -> None:
    if "\0" in entry:
        raise ValueError(f"{name} {entry!r:.200}: must not hold a null character")
    if "\n" in entry or (entry.startswith("[") and entry.endswith("]")):
        raise ValueError(f"{name} {entry!r:.200}: is a list in a single text; give each {_entry(name)} separately")
    if not name.endswith("prompts") and len(parts := _SEPARATORS.split(entry)) > 1:
        separate = " ".join(f'"{part.strip()}"' for part in parts if part.strip())
        note('%s: "%s" is a single concept; for %d concepts use --%s %s', name, entry, len(parts), name, separate)


def _read_lines(path: Path, name: str) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{name} file {path}: no such file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} file {path}: cannot be read as UTF-8 text ({error})") from None
    if not (entries := [line for line in lines if line and not line.startswith("#")]):
        raise ValueError(f"{name} file {path}: contains no {_entry(name)}; write one per line")
    return entries


def is_visible(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)


def _entry(name: str) -> str:
    return "prompt" if name.endswith("prompts") else "concept"


def names_concept(prompt: str, concept: str) -> bool:
    """Whether a prompt contains the words of a concept: whole consecutive words, in any case, singular or plural."""
    words, sought = _words(prompt), _words(concept)
    return bool(sought) and any(
        all(map(_same_word, words[start : start + len(sought)], sought))
        for start in range(len(words) - len(sought) + 1)
    )


@lru_cache(4096)
def _words(text: str) -> tuple[str, ...]:
    """The words and symbols of a text; `Van_Gogh` and `van-gogh` are two words."""
    return tuple(re.findall(r"[^\W_]+|[^\w\s-]", unicodedata.normalize("NFKC", text).casefold()))


def _same_word(first: str, second: str) -> bool:
    return first == second or first in _singulars(second) or second in _singulars(first)


@lru_cache(4096)
def _singulars(word: str) -> frozenset[str]:
    """The words of which a word may be the plural."""
    endings = {"s": ("",), "es": ("",), "ies": ("y",), "ves": ("f", "fe"), "men": ("man",), "children": ("child",)}
    return frozenset(
        word.removesuffix(plural) + singular
        for plural, singulars in endings.items()
        if word.endswith(plural) and len(word) > 3 and not word.endswith(("ss", "us", "is"))
        for singular in singulars
    )


@lru_cache
def naming_pattern(concepts: tuple[str, ...]) -> re.Pattern:
    """A fast pattern that finds concepts in captions as whole words in any case, without plurals."""
    names = "|".join(map(re.escape, concepts))
    return re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE)


def joined(concepts: list[str]) -> str:
    """All concepts in one prompt, as in SDD: `"knife, gun, bomb"`."""
    return ", ".join(concepts)


@typed
@dataclass(frozen=True)
class ConceptSchedule:
    """The prompts of each training sample: one to sample its latent, and one to train on.

    The `schedule` chooses the current concept of a sample:

    * `"iterative"`: each concept in turn, from sample to sample (the paper of SDD);
    * `"random"`: uniformly at random;
    * `"composite"`: always all concepts, joined with commas;
    * `"sequential"`: the first concept for an equal share of the samples, then the second, and so on. "All concepts"
      is then only the current concept, because a continual schedule does not know the following ones.

    The `prompt_order` chooses where it is used. `"paper"` samples latents with the current concept and trains on all
    concepts joined, as in the paper of SDD. `"repository"` samples with all concepts and trains on the current one, as
    in the code of SDD. `"matched"` uses the current concept for both. With a single concept they are equal.

    Args:
        concepts (`list[str]`): One or more concepts.
        schedule (`str`, defaults to `"iterative"`): One of `CONCEPT_SCHEDULES`.
        prompt_order (`str`, defaults to `"paper"`): One of `PROMPT_ORDERS`.
        num_samples (`int`, *optional*): Number of samples of the whole run; required for `"sequential"`.
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
        """The prompts of a sample.

        Args:
            index (`int`): Number of the sample, counted from 0 over the whole run.
            generator (`torch.Generator`): Generator for the schedule `"random"`.

        Returns:
            `tuple[str, str]`: The prompt that samples the latent, and the prompt to train on.
        """
        current = self._current_concept(index, generator)
        all_concepts = current if self.schedule == "sequential" else joined(self.concepts)
        if self.prompt_order == "paper":
            return current, all_concepts
        if self.prompt_order == "repository":
            return all_concepts, current
        return current, current

    def _current_concept(self, index: int, generator: torch.Generator) -> str:
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
