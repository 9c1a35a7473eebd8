"""What to erase: reading lists of concepts, and the order in which several are trained."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch


CONCEPT_SCHEDULES = ("iterative", "random", "composite", "sequential")
PROMPT_ORDERS = ("paper", "repository", "matched")


def read_concepts(values: list[str]) -> list[str]:
    """Reads `--concepts`: names, or one `.txt` file with a concept a line.

    In a file, empty lines and lines that start with `#` are skipped. Repeated concepts are kept once.

    Args:
        values (`list[str]`): `["Van Gogh", "Claude Monet"]` or `["artists.txt"]`.

    Returns:
        `list[str]`: At least one concept, none of them blank.

    Raises:
        `ValueError`: If the list or the file is empty, a concept is blank, or the file does not exist.
    """
    if len(values) == 1 and values[0].endswith(".txt"):
        path = Path(values[0])
        if not path.is_file():
            raise ValueError(f"concepts file {path}: no such file")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"concepts file {path}: cannot be read as UTF-8 text ({error})") from None
        concepts = [line for line in lines if line and not line.startswith("#")]
        if not concepts:
            raise ValueError(f"concepts file {path}: holds no concept; write one a line")
    else:
        concepts = [value.strip() for value in values]
        if not concepts or not all(concepts):
            raise ValueError(f"concepts {values}: give at least one concept, and none that is blank")
    return list(dict.fromkeys(concepts))


def names_concept(prompt: str, concept: str) -> bool:
    """Whether a prompt has a concept's words in it, as whole words and in whatever case."""
    return naming_pattern((concept,)).search(prompt) is not None


@lru_cache
def naming_pattern(concepts: tuple[str, ...]) -> re.Pattern:
    """What is found in the prompts that name one of these concepts; for many prompts."""
    names = "|".join(map(re.escape, concepts))
    return re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE)


def joined(concepts: list[str]) -> str:
    """All concepts in one prompt, as SDD writes them: `"knife, gun, bomb"`."""
    return ", ".join(concepts)


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
        for name, value, allowed in (
            ("concept_schedule", self.schedule, CONCEPT_SCHEDULES),
            ("prompt_order", self.prompt_order, PROMPT_ORDERS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} '{value}': unknown; allowed are {', '.join(allowed)}")
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
