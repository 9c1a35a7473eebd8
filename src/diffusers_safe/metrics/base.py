"""The base class of metrics: a network scores each image once, and numbers are computed from the stored scores.

metric = PixelDistance()
scores = score_images(metric, "runs/erased", rows, originals=("runs/original", original_rows))  # stored on disk
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


def check_once(kind: str, names: Sequence[str]) -> None:
    """
    Raises:
        `ValueError`: If a name occurs twice.
    """
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"{kind} '{name}': given twice")


@dataclass(frozen=True)
class Quantity:
    """A number that a metric measures, and how to read it.

    Attributes:
        label (`str`): Name in tables.
        unit (`str`, defaults to `""`): `"%"` for a share of images, `""` for anything else.
        better (`str`, *optional*): `"lower"` or `"higher"`; `None` if neither is better in itself.
        of_concept (`bool`, defaults to `False`): Whether it measures the erased concept rather than other concepts.
        note (`str`, defaults to `""`): One more sentence for tables.
        drawn (`str`, defaults to `"prompts"`): What an interval resamples. `"images"` if there are no other prompts,
            such as the few names of a concept, so that only the seeds vary.

    Raises:
        `ValueError`: If `unit`, `better` or `drawn` is none of these.
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
        """The cluster that an image belongs to when an interval resamples clusters."""
        return row["prompt"] if self.drawn == "prompts" else row["id"]


class Metric(ABC):
    """One measure of generated images.

    A subclass describes itself (`name`, `quantities`, `identity`), scores images, and derives numbers of each image
    from its score. Metrics that are more than an average of these numbers override `compute`.

    Attributes:
        name (`str`): Name on the command line and of the files of scores.
        quantities (`dict[str, Quantity]`): What `compute` returns, in order.
        compares (`bool`, defaults to `False`): Whether each image is compared with the original model's image of the
            same prompt and seed.
        same_size (`bool`, defaults to `False`): Whether two images that are compared must be of the same size.
    """

    name: ClassVar[str]
    quantities: dict[str, Quantity]
    compares: ClassVar[bool] = False
    same_size: ClassVar[bool] = False

    def __init__(self):
        self.reset()

    @abstractmethod
    def identity(self) -> dict:
        """Everything that determines raw scores, such as a hash of the weights and the resize, as JSON values. What is
        applied to stored scores, such as a threshold, is not part of it."""

    def check(self, rows: Sequence[dict]) -> None:  # noqa: B027
        """Checks the rows of all images before the first is scored. Default: accepts all.

        Raises:
            `ValueError`: If they lack what the metric needs, such as a label.
        """

    @abstractmethod
    def score(
        self, images: Sequence[Image.Image], rows: Sequence[dict], originals: Sequence[Image.Image] | None = None
    ) -> list[dict]:
        """Scores images.

        Args:
            images (`Sequence[Image.Image]`): RGB images of any size.
            rows (`Sequence[dict]`): Their rows of the manifest.
            originals (`Sequence[Image.Image]`, *optional*): The original model's images, if the metric `compares`.

        Returns:
            `list[dict]`: The raw score of each image, as JSON values.
        """

    def values(self, row: dict, score: dict) -> dict[str, float]:
        """The numbers of one image by name of `quantities`, without those that do not apply to it. Shares of images
        are 0 or 1. Differences between models are computed from these, image by image."""
        return {}

    def seen(self, row: dict, score: dict) -> str:
        """What the metric recognises on an image, in one word, for the page. Default: nothing."""
        return ""

    def reset(self) -> None:
        """Removes all images."""
        self.rows: list[dict] = []
        self.scores: list[dict] = []

    def update(self, rows: Sequence[dict], scores: Sequence[dict]) -> None:
        """Adds images by their rows of the manifest and their raw scores."""
        if len(rows) != len(scores):
            raise ValueError(f"{len(rows)} rows with {len(scores)} scores; there must be one for each")
        self.rows += rows
        self.scores += scores

    def compute(self) -> dict[str, Estimate]:
        """The estimates over all images so far, without the quantities that apply to none of them.

        Each is the average of `values`. If prompts have several images, its interval is a bootstrap over prompts.
        Otherwise, or if a quantity resamples images, a share has its Wilson interval.

        Raises:
            `ValueError`: If there are no images, or a number is not finite, or a share is neither 0 nor 1.
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
        """Further results, such as counts of each class, as JSON values. Default: none."""
        return {}
