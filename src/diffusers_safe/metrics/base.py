"""What all metrics share: a network scores each image once, and numbers are made of these scores as often as asked.

metric = PixelDistance()
scores = score_images(metric, "runs/erased", rows, originals=("runs/original", original_rows))  # kept on disk
metric.update(rows, scores)
metric.compute()  # {"pixel_distance": Estimate(...)}
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from ..report.statistics import Estimate


@dataclass(frozen=True)
class Quantity:
    """A number that a metric gives, and how to read it.

    Attributes:
        label (`str`): As tables show it.
        unit (`str`, defaults to `""`): `"%"` for a share of images, `""` for anything else.
        better (`str`, *optional*): `"lower"` or `"higher"`; `None` where neither is better in itself.
        of_concept (`bool`, defaults to `False`): Whether it tells of what was to go, rather than of what was to stay.
        note (`str`, defaults to `""`): One more sentence, where the label does not say all.
        drawn (`str`, defaults to `"prompts"`): What an interval draws anew; `"images"` where the prompts are all that
            there are, such as the few names of a concept, and only seeds could be others.
    """

    label: str
    unit: str = ""
    better: str | None = None
    of_concept: bool = False
    note: str = ""
    drawn: str = "prompts"

    def __post_init__(self):
        if self.unit not in ("%", "") or self.better not in ("lower", "higher", None):
            raise ValueError(f"{self.label}: unit '{self.unit}' or better '{self.better}' is not allowed")
        if self.drawn not in ("prompts", "images"):
            raise ValueError(f"{self.label}: drawn '{self.drawn}' is not allowed")

    def cluster(self, row: dict) -> Hashable:
        """What an image is drawn with, when an interval draws anew."""
        return row["prompt"] if self.drawn == "prompts" else row["id"]


class Metric(ABC):
    """One measure of generated images.

    A subclass says what it is (`name`, `quantities`, `identity`), scores images, and says what number of each image
    follows from its score. What is more than an average of these overrides `compute`.

    Attributes:
        name (`str`): As the command line and the files of scores call it.
        quantities (`dict[str, Quantity]`): What `compute` gives, in order.
        compares (`bool`, defaults to `False`): Whether each image is scored beside the original model's image of the
            same prompt and seed.
    """

    name: ClassVar[str]
    quantities: dict[str, Quantity]
    compares: ClassVar[bool] = False

    def __init__(self):
        self.reset()

    @abstractmethod
    def identity(self) -> dict:
        """Everything that decides raw scores, such as weights by their hash and the resize; fits into JSON. What is
        applied to finished scores, such as a threshold, is not part of it."""

    def check(self, rows: Sequence[dict]) -> None:  # noqa: B027
        """Looks at the rows of all images before the first is scored.

        Raises:
            `ValueError`: If they lack what the metric needs, such as a label. Nothing is asked unless overridden.
        """

    @abstractmethod
    def score(
        self, images: Sequence[Image.Image], rows: Sequence[dict], originals: Sequence[Image.Image] | None = None
    ) -> list[dict]:
        """Raw scores, one `dict` an image that fits into JSON.

        Args:
            images (`Sequence[Image.Image]`): RGB, of any sizes.
            rows (`Sequence[dict]`): Their rows of the manifest.
            originals (`Sequence[Image.Image]`, *optional*): Where the metric `compares`, the original's images.
        """

    def values(self, row: dict, score: dict) -> dict[str, float]:
        """The numbers of one image, a name of `quantities` for each; without those that do not concern it. Shares of
        images are 0 or 1 here. Differences between models are taken image by image of these."""
        return {}

    def seen(self, row: dict, score: dict) -> str:
        """What the metric sees on an image, in a word, for the page. Nothing unless overridden."""
        return ""

    def reset(self) -> None:
        """Forgets all images."""
        self.rows: list[dict] = []
        self.scores: list[dict] = []

    def update(self, rows: Sequence[dict], scores: Sequence[dict]) -> None:
        """Adds images by their rows of the manifest and their raw scores."""
        if len(rows) != len(scores):
            raise ValueError(f"{len(rows)} rows with {len(scores)} scores; there must be one for each")
        self.rows += rows
        self.scores += scores

    def compute(self) -> dict[str, Estimate]:
        """What all images so far give, without the quantities that concern none of them.

        The average of `values`. If a prompt has several images, prompts are drawn anew by the bootstrap, else a share
        has its Wilson interval; so has one whose interval is of images.

        Raises:
            `ValueError`: If there are no images, or a number of one is not finite or, of a share, neither 0 nor 1.
        """
        if not self.rows:
            raise ValueError(f"{self.name}: there are no images to measure")
        found = [(row, self._checked_values(row, score)) for row, score in zip(self.rows, self.scores)]
        estimates = {}
        for name, quantity in self.quantities.items():
            chosen = [(quantity.cluster(row), values[name]) for row, values in found if name in values]
            if chosen:
                clusters, numbers = zip(*chosen)
                estimates[name] = Estimate.of_images(numbers, clusters, quantity.unit)
        return estimates

    def _checked_values(self, row: dict, score: dict) -> dict[str, float]:
        values = self.values(row, score)
        for name, value in values.items():
            share = name in self.quantities and self.quantities[name].unit == "%"
            if not math.isfinite(value) or (share and value not in (0, 1)):
                allowed = "0 or 1" if share else "a finite number"
                raise ValueError(f"{self.name}: {name} of image {row['id']} is {value}; it must be {allowed}")
        return values

    def details(self) -> dict:
        """What else there is to say, such as counts of each class; fits into JSON. Empty unless overridden."""
        return {}
