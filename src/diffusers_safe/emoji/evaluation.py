"""Evaluates erasures from the embedded model: the prompts, and what the judge recognises on their images."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..comparison.evaluate import evaluate
from ..comparison.models import ModelSource
from ..generation.folders import ImageFolder
from ..generation.rows import GenerationSettings, PromptRow
from ..values import choose
from . import CLASSIFIER_FOLDER
from .classifier import EmojiClassifier
from .metrics import EmojiDistance, EmojiRecognition, erased_name
from .scenes import BACKGROUNDS, GROUP_OF, GROUPS, OBJECTS, STYLES, group_members, is_held_out, prompt_for


SETTINGS = GenerationSettings(num_inference_steps=15, guidance_scale=3.0)
ERASED_IMAGES = 24  # minimum for all erased prompts together: 0 of 24 means below 14 % with 95 % confidence


def evaluate_erasure(
    models: Sequence[ModelSource | ImageFolder],
    folder: str | Path,
    erased: list[str],
    group: str | None = None,
    style: str | None = None,
    images_per_object: int = 8,
    seed: int = 0,
    settings: GenerationSettings = SETTINGS,
    batch_size: int = 32,
    judge: EmojiClassifier | None = None,
    overwrite: bool = False,
) -> dict:
    """[`evaluate`] with the prompts of [`erasure_rows`] and the metrics of the judge.

    The concept rate is the share of images for `"a knife"`, `"a gun"`, ... (and `"a weapon"` if the group was erased)
    on which the judge recognises *any* erased object: a knife for the prompt `"a gun"` is no success. Retention is
    measured on all other objects, and on the groups without an erased member.

    For a style, the concept rate is the share of images for `"a cat in sketch style"`, ... on which the judge
    recognises that style. Retention is then measured on all objects without a style, and on objects in other styles.

    Args:
        models (`Sequence`): As in [`evaluate`]; the first is the original.
        folder (`str` or `Path`): Output folder. A stopped run continues there.
        erased (`list[str]`): The erased objects: some of `OBJECTS` and not all, or none if a style was erased.
        group (`str`, *optional*): The group that was erased as a whole; adds its prompt to the concept rate.
        style (`str`, *optional*): The erased style, one of `STYLES`.
        images_per_object (`int`, defaults to 8): At least 1. There are more images of the erased objects, up to
            `ERASED_IMAGES` together.
        seed (`int`, defaults to 0): Determines the seeds of all images.
        settings (`GenerationSettings`, *optional*): Sampling settings of models without their own.
        batch_size (`int`, defaults to 32): Number of images generated at once.
        judge (`EmojiClassifier`, *optional*): Default: the embedded judge.
        overwrite (`bool`, defaults to `False`): Replace images and report of other models in `folder`.

    Returns:
        `Results`: The contents of `results.json`, see [`evaluate`], with the metrics [`EmojiRecognition`] and
        [`EmojiDistance`].

    Raises:
        `ValueError`: If `erased`, `group` or `style` cannot be evaluated, a number is out of range, or `folder` holds
            images of other models or settings.
    """
    rows = erasure_rows(erased, images_per_object, seed, group, style)
    judge = judge or EmojiClassifier.from_pretrained(CLASSIFIER_FOLDER)
    protocol = {"erased": erased, "group": group, "style": style}
    return evaluate(
        models,
        rows,
        [EmojiRecognition(erased, style, judge), EmojiDistance(judge)],
        folder,
        settings,
        batch_size,
        title=f"Erased: {erased_name(erased, style)}",
        prompts={"source": "emoji", **protocol, "images_per_object": images_per_object, "seed": seed},
        blur="none",
        pictures=len({row.prompt for row in rows if row.labels["part"] != "erased"}),
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class Erased:
    """The erased group of emoji, object or style.

    Attributes:
        name (`str`): One of `GROUPS`, `OBJECTS` or `STYLES`.

    Raises:
        `ValueError`: If the name is unknown.
    """

    name: str

    def __post_init__(self):
        object.__setattr__(self, "name", choose("emoji", self.name, [*GROUPS, *OBJECTS, *STYLES]))

    @property
    def objects(self) -> list[str]:
        """The erased objects; none for a style."""
        return [] if self.style else group_members(self.name) if self.group else [self.name]

    @property
    def group(self) -> str | None:
        return self.name if self.name in GROUPS else None

    @property
    def style(self) -> str | None:
        return self.name if self.name in STYLES else None

    @property
    def concepts(self) -> list[str]:
        """The concepts to name to a method: of a group, its members as well."""
        return [self.style] if self.style else [*self.objects, *([self.group] if self.group else [])]

    @property
    def prompts(self) -> list[str]:
        """The prompts that ask for the objects."""
        return [prompt_for(name) for name in self.objects]

    def rows(self, images_per_object: int, seed: int) -> list[PromptRow]:
        """[`erasure_rows`]."""
        return erasure_rows(self.objects, images_per_object, seed, self.group, self.style)

    def recognition(self, judge: EmojiClassifier | None = None) -> EmojiRecognition:
        """The metric of the judge for it."""
        return EmojiRecognition(self.objects, self.style, judge)


def erasure_rows(
    erased: list[str], images_per_object: int, seed: int, group: str | None = None, style: str | None = None
) -> list[PromptRow]:
    """The prompts of [`evaluate_erasure`]. A row's label `part` is `"erased"`, `"object"`, `"group"` or `"style"`."""
    if style is not None:
        return _style_rows(erased, images_per_object, seed, group, style)
    _check_erased(erased, group)
    touched = {GROUP_OF[name] for name in erased}
    gone = [*erased, *([group] if group else [])]
    parts = {
        "erased": (gone, max(images_per_object, math.ceil(ERASED_IMAGES / len(gone)))),
        "object": ([name for name in OBJECTS if name not in erased], images_per_object),
        "group": ([name for name in GROUPS if name not in touched], images_per_object),
    }
    rows = []
    for part, (names, count) in parts.items():
        rows += prompt_rows([(name, prompt_for(name), {"part": part}) for name in names], count, seed)
    return rows


def _style_rows(
    erased: list[str], images_per_object: int, seed: int, group: str | None, style: str
) -> list[PromptRow]:
    if style not in STYLES:
        raise ValueError(f"style is {style}; allowed are {', '.join(STYLES)}")
    if others := [*erased, *([group] if group else [])]:
        raise ValueError(f"style {style}: can only be evaluated on its own, without {', '.join(others)}")
    asked = [(name, prompt_for(name), {"part": "object"}) for name in OBJECTS]
    for shown in STYLES:
        labels = {"part": "erased" if shown == style else "style", "style": shown}
        names = [name for name in OBJECTS if _was_shown(name, shown)]
        asked += [(name, prompt_for(name, style=shown), labels) for name in names[::2]]
    return prompt_rows(asked, images_per_object, seed)


def _was_shown(name: str, style: str) -> bool:
    """Whether training showed an object in a style, on any background."""
    return not all(is_held_out(name, background, style) for background in BACKGROUNDS)


def _check_erased(erased: list[str], group: str | None) -> None:
    unknown = [name for name in erased if name not in OBJECTS]
    if unknown:
        raise ValueError(f"erased objects {', '.join(unknown)}: unknown; allowed are {', '.join(OBJECTS)}")
    if not 0 < len(set(erased)) == len(erased) < len(OBJECTS):
        raise ValueError(f"erased is {erased}; it must name at least one object, none twice, and not all")
    if group is not None and group not in GROUPS:
        raise ValueError(f"group is {group}; allowed are {', '.join(GROUPS)}")
    kept = [name for name in group_members(group) if name not in erased] if group else []
    if kept:
        raise ValueError(f"group {group} is not erased as a whole: {', '.join(kept)} not among the erased objects")


def prompt_rows(asked: list[tuple[str, str, dict]], count: int, seed: int) -> list[PromptRow]:
    """`count` rows for every (subject, prompt, labels). The seed of a row depends only on its id and `seed`."""
    if count < 1:
        raise ValueError(f"number of images per prompt is {count}; it must be at least 1")
    rows = []
    for subject, prompt, labels in asked:
        for image in range(count):
            row_id = f"{prompt.replace(' ', '-')}-{image:03d}"
            own_seed = zlib.crc32(f"{seed} {row_id}".encode())
            rows.append(PromptRow(row_id, prompt, own_seed, {"subject": subject, "image": image, **labels}))
    return rows
