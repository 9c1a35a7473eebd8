"""What erasures did to the embedded model: the prompts on which it is measured, and their evaluation."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..arguments import choose
from ..comparison.evaluate import evaluate
from ..comparison.models import ModelSource
from ..generation.folders import ImageFolder
from ..generation.rows import GenerationSettings, PromptRow
from . import CLASSIFIER_FOLDER
from .classifier import EmojiClassifier
from .metrics import EmojiDistance, EmojiRecognition, erased_name
from .scenes import BACKGROUNDS, GROUP_OF, GROUPS, OBJECTS, STYLES, group_members, is_held_out, prompt_for


SETTINGS = GenerationSettings(num_inference_steps=25, guidance_scale=6.0)
ERASED_IMAGES = 24  # at least, of all erased prompts together: none of 24 is below 14 % with 95 % confidence


def evaluate_erasure(
    models: Sequence[ModelSource | ImageFolder],
    folder: str | Path,
    erased: list[str],
    group: str | None = None,
    style: str | None = None,
    retained: list[str] | None = None,
    images_per_object: int = 8,
    seed: int = 0,
    settings: GenerationSettings = SETTINGS,
    batch_size: int = 32,
    judge: EmojiClassifier | None = None,
    overwrite: bool = False,
) -> dict:
    """[`evaluate`] with the prompts of [`erasure_rows`] and what the judge sees on their images.

    The concept rate is the share of images for `"a knife"`, `"a gun"`, ... (and `"a weapon"` if the group was erased)
    on which the judge sees *any* erased object: a gun asked for and a knife drawn is no success. Everything else is
    measured on what was not to be touched: all other objects, and the groups without an erased member.

    Of a style it is the share of images for `"a cat in sketch style"`, ... on which the judge sees that style. What
    was not to be touched are then all objects without a style, and objects in the other styles.

    Args:
        models (`Sequence`): As [`evaluate`] takes them; the first is the original.
        folder (`str` or `Path`): Where everything goes. A stopped run continues there.
        erased (`list[str]`): Which objects were erased: some of `OBJECTS` and not all, or none where it was a style.
        group (`str`, *optional*): The group that was erased as a whole; adds its own prompt to the concept rate.
        style (`str`, *optional*): The style that was erased, one of `STYLES`.
        retained (`list[str]`, *optional*): What the training named as to be kept. The other objects, which it did not
            name, are then also measured by themselves.
        images_per_object (`int`, defaults to 8): At least 1; of those that were erased as many more as make
            `ERASED_IMAGES` together.
        seed (`int`, defaults to 0): Every image's own seed follows from it.
        settings (`GenerationSettings`, *optional*): How to sample, where a model has no settings of its own.
        batch_size (`int`, defaults to 32): Images at once.
        judge (`EmojiClassifier`, *optional*): Default the one that ships.
        overwrite (`bool`, defaults to `False`): Replace the images and the report of other models that `folder` holds.

    Returns:
        `dict`: What `results.json` holds, see [`evaluate`]: under `metrics` those of [`EmojiRecognition`] and
        [`EmojiDistance`].

    Raises:
        `ValueError`: If `erased`, `group` or `style` names nothing that can be evaluated, a number is out of its
            range, or `folder` holds images of other models or settings.
    """
    rows = erasure_rows(erased, images_per_object, seed, group, style)
    judge = judge or EmojiClassifier.from_pretrained(CLASSIFIER_FOLDER)
    protocol = {"erased": erased, "group": group, "style": style, "retained": retained}
    return evaluate(
        models,
        rows,
        [EmojiRecognition(erased, style, judge, retained), EmojiDistance(judge)],
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
    """What a name stands for: a group of emoji, an object or a style.

    Attributes:
        name (`str`): One of `GROUPS`, `OBJECTS` or `STYLES`.

    Raises:
        `ValueError`: If it is none of them.
    """

    name: str

    def __post_init__(self):
        object.__setattr__(self, "name", choose("emoji", self.name, [*GROUPS, *OBJECTS, *STYLES]))

    @property
    def objects(self) -> list[str]:
        """Those that are erased; none if it is a style."""
        return [] if self.style else group_members(self.name) if self.group else [self.name]

    @property
    def group(self) -> str | None:
        return self.name if self.name in GROUPS else None

    @property
    def style(self) -> str | None:
        return self.name if self.name in STYLES else None

    @property
    def prompts(self) -> list[str]:
        """Those that ask for the objects."""
        return [prompt_for(name) for name in self.objects]

    def rows(self, images_per_object: int, seed: int) -> list[PromptRow]:
        """[`erasure_rows`]."""
        return erasure_rows(self.objects, images_per_object, seed, self.group, self.style)

    def recognition(self, judge: EmojiClassifier | None = None) -> EmojiRecognition:
        """The judge, who looks for it."""
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
        raise ValueError(f"style {style}: is erased alone here, without {', '.join(others)}")
    subjects = [(name, prompt_for(name), {"part": "object"}) for name in OBJECTS]
    for shown in STYLES:
        labels = {"part": "erased" if shown == style else "style", "style": shown}
        names = [name for name in OBJECTS if _was_shown(name, shown)]
        subjects += [(name, prompt_for(name, style=shown), labels) for name in names[::2]]
    return prompt_rows(subjects, images_per_object, seed)


def _was_shown(name: str, style: str) -> bool:
    """Whether training has shown an object in a style, on whatever background."""
    return not all(is_held_out(name, background, style) for background in BACKGROUNDS)


def _check_erased(erased: list[str], group: str | None) -> None:
    unknown = [name for name in erased if name not in OBJECTS]
    if unknown:
        raise ValueError(f"erased objects {', '.join(unknown)}: unknown; allowed are {', '.join(OBJECTS)}")
    if not 0 < len(set(erased)) == len(erased) < len(OBJECTS):
        raise ValueError(f"erased is {erased}; it must name at least one object, none twice, and leave some over")
    if group is not None and group not in GROUPS:
        raise ValueError(f"group is {group}; allowed are {', '.join(GROUPS)}")
    kept = [name for name in group_members(group) if name not in erased] if group else []
    if kept:
        raise ValueError(f"group {group} is not erased as a whole: {', '.join(kept)} not among the erased objects")


def prompt_rows(subjects: list[tuple[str, str, dict]], count: int, seed: int) -> list[PromptRow]:
    """`count` rows of every (subject, prompt, labels). A row's seed follows from its id: it stays when others come."""
    if count < 1:
        raise ValueError(f"number of images per prompt is {count}; it must be at least 1")
    rows = []
    for subject, prompt, labels in subjects:
        for image in range(count):
            row_id = f"{prompt.replace(' ', '-')}-{image:03d}"
            own_seed = zlib.crc32(f"{seed} {row_id}".encode())
            rows.append(PromptRow(row_id, prompt, own_seed, {"subject": subject, "image": image, **labels}))
    return rows
