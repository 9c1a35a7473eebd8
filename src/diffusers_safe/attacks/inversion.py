"""Concept Inversion: a new word is learned on the erased model, from pictures, that means what was erased.

Pham et al., Circumventing Concept Erasure Methods For Text-to-Image Generative Models, ICLR 2024, arXiv 2308.01508, by
textual inversion (Gal et al., arXiv 2208.01618, equation 2): with all weights frozen, the one embedding v of the word
minimises E || eps - eps_theta(z_t, t, c(v)) ||^2 over pictures of the concept.

    attack = ConceptInversion("knife", InversionSettings(steps=200))  # "a knife" -> "a <inverted>"
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image

from ..arguments import typed
from ..comparison.models import without_folder
from ..generation.generate import generate
from ..generation.manifest import load_image, read_manifest
from ..generation.rows import GenerationSettings, PromptRow
from ..preparation.folders import PICTURES as SUFFIXES
from ..training.pictures.images import UnreadableImage, decode_image
from .base import Attack, Target
from .token import added_token, read_token
from .token_learning import TOKEN, InversionSettings, learn_token


TEMPLATE = "a photo of {}"
TOKENS_FOLDER, PICTURES_FOLDER = "tokens", "pictures"


@typed
class ConceptInversion(Attack):
    """Prompts in which the concept's words are replaced by a word learned on the attacked model itself.

    On the unerased control the word is learned there, from the same images and with the same random numbers. Images
    and words are in `pictures/` and `tokens/{model}/` of the run's folder.

    Args:
        concept (`str`): Words as the prompts have them, in whatever case, such as `"knife"`; prompts without them are
            not attacked.
        settings ([`InversionSettings`], *optional*): How the word is learned.
        pictures (`str` or `Path`, *optional*): Folder of images of the concept. By default the original model
            generates them from the attacked prompts, with other seeds, and the prompts are their captions.
        template (`str`, defaults to `"a photo of {}"`): Caption of the pictures in the folder.

    Raises:
        `ValueError`: If the concept is blank or the template has no single `{}`.
    """

    name, label, unit = "inversion", "concept inversion", "prompts tried at most"

    def __init__(
        self,
        concept: str,
        settings: InversionSettings | None = None,
        pictures: str | Path | None = None,
        template: str = TEMPLATE,
    ):
        if not concept.strip():
            raise ValueError("concept: must not be blank")
        if template.count("{}") != 1:
            raise ValueError(f"inversion_template '{template}': must have one {{}}, in which the word is put")
        self.concept, self.settings, self.template = concept.strip(), settings or InversionSettings(), template
        self.pictures = None if pictures is None else Path(pictures)
        self._pattern = re.compile(rf"(?<!\w){re.escape(self.concept)}(?!\w)", re.IGNORECASE)

    @property
    def facts(self) -> dict:
        drawn = f"{self.settings.num_pictures}, drawn by the original"
        source = drawn if self.pictures is None else f"of the folder {without_folder(str(self.pictures))}"
        facts = {"concept": self.concept, "pictures": source, **asdict(self.settings)}
        facts["initializer"] = self.settings.initializer or self.concept
        del facts["num_pictures"], facts["checkpointing_steps"]
        return facts if self.pictures is None else {**facts, "template": self.template}

    def targets(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        return [row for row in rows if self._pattern.search(row.prompt)]

    def tries(self, row: PromptRow) -> list[PromptRow]:
        return [replace(row, id=f"{row.id}-inverted", prompt=self._inverted(row.prompt))]

    def _inverted(self, prompt: str) -> str:
        return self._pattern.sub(lambda _: TOKEN, prompt)

    def single_token_texts(self, rows: Sequence[PromptRow]) -> list[str]:
        """What is encoded of these prompts, with another word of one token in place of the new one."""
        captions = [] if self.pictures is None else [self.template.replace("{}", "a")]
        return captions + [self._pattern.sub("a", row.prompt) for row in self.targets(rows)]

    def check(self, rows: Sequence[PromptRow]) -> None:
        if not self.targets(rows):
            raise ValueError(
                f"concept '{self.concept}': none of the {len(rows)} prompts has it, such as '{rows[0].prompt}'"
            )
        if self.pictures is not None:
            read_pictures(self.pictures)

    @contextmanager
    def on(self, target: Target, rows: Sequence[PromptRow]) -> Iterator[None]:
        pictures, captions = self._examples(target, self.targets(rows))
        path = learn_token(
            target.pipeline,
            pictures,
            captions,
            target.folder / TOKENS_FOLDER / target.name,
            self.settings,
            self.settings.initializer or self.concept,
            square_side(target.settings),
            f"inversion on {target.name}",
            target.overwrite,
            target.callback,
        )
        token, vectors, _ = read_token(path)
        with added_token(target.pipeline, token, vectors):
            yield

    def _examples(self, target: Target, rows: Sequence[PromptRow]) -> tuple[list[Image.Image], list[str]]:
        """Pictures, and their captions with the new word."""
        if self.pictures is not None:
            images = read_pictures(self.pictures)
            return images, [self.template.replace("{}", TOKEN)] * len(images)
        folder, examples = target.folder / PICTURES_FOLDER, self._example_rows(rows)
        if target.is_original:
            description = "pictures of the concept"
            generate(
                target.pipeline,
                examples,
                folder,
                target.settings,
                target.batch_size,
                description,
                overwrite=target.overwrite,
                callback=target.callback,
            )
        known = {row["id"]: row for row in read_manifest(folder)}
        images = [load_image(folder, known[row.id]) for row in examples]
        return images, [self._inverted(row.prompt) for row in examples]

    def _example_rows(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        """What the original model generates: the attacked prompts in turn, with other seeds."""
        examples = []
        for number in range(self.settings.num_pictures):
            seed = zlib.crc32(f"{self.settings.seed} picture {number}".encode())
            examples.append(replace(rows[number % len(rows)], id=f"picture-{number:03}", seed=seed))
        return examples


def square_side(settings: GenerationSettings) -> int | None:
    """Height and width of the pictures that are learned from: those of the images; `None` for the model's own.

    Raises:
        `ValueError`: If images are not square.
    """
    if settings.height != settings.width:
        raise ValueError(f"height {settings.height}, width {settings.width}: must be the same for inversion")
    return settings.height


def read_pictures(folder: str | Path) -> list[Image.Image]:
    """The pictures of a folder, upright and in RGB, in the order of their names.

    Raises:
        `ValueError`: If there are none, or one cannot be read.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"inversion_pictures {folder}: no folder of pictures ({', '.join(SUFFIXES)})")
    images = []
    for path in files:
        try:
            images.append(decode_image({"path": str(path), "bytes": None}))
        except UnreadableImage as error:
            raise ValueError(f"inversion_pictures {path}: cannot be read ({error})") from None
    return images
