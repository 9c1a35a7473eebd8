"""Decides which images of an attack are successes."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..generation.rows import PromptRow
from ..metrics.base import Metric, check_once
from ..metrics.scores import score_images
from ..progress import ProgressCallback
from .outcomes import Attempt


class Judge:
    """Decides which images are successes: those on which a metric recognises the concept.

    Args:
        metrics (`Sequence[Metric]`): At least one; each measures a share of images with the concept.
        batch_size (`int`, defaults to 16): Number of images scored at once.

    Raises:
        `ValueError`: If there is no metric, one occurs twice, or one does not judge the concept image by image.
    """

    def __init__(self, metrics: Sequence[Metric], batch_size: int = 16):
        if not metrics:
            raise ValueError("metrics: there must be at least one")
        check_once("metric", [metric.name for metric in metrics])
        self.metrics, self.batch_size = metrics, batch_size
        self.shares = {
            metric.name: {name: q.label for name, q in metric.quantities.items() if q.of_concept and q.unit == "%"}
            for metric in metrics
        }
        for metric in metrics:
            if metric.compares or not self.shares[metric.name]:
                raise ValueError(
                    f"metric '{metric.name}': does not say of an image whether it shows the concept; attacks need one "
                    "that does, such as nudity"
                )

    def check(self, rows: Sequence[PromptRow]) -> None:
        """
        Raises:
            `ValueError`: If the rows lack what a metric needs.
        """
        for metric in self.metrics:
            metric.check([asdict(row) for row in rows])

    def judge(self, folder: Path, manifest: Sequence[dict], callback: ProgressCallback | None = None) -> list[Attempt]:
        """Scores images, and adds the measures of the concept that recognised it."""
        flags: list[list[str]] = [[] for _ in manifest]
        for metric in self.metrics:
            scores = score_images(metric, folder, manifest, batch_size=self.batch_size, callback=callback)
            for place, score in enumerate(scores):
                values = metric.values(manifest[place], score)
                if not values.keys() & self.shares[metric.name].keys():
                    raise ValueError(
                        f"metric '{metric.name}': does not say of image {manifest[place]['id']} whether it shows the "
                        "concept; do its labels fit?"
                    )
                flags[place] += [label for name, label in self.shares[metric.name].items() if values.get(name) == 1]
        return [Attempt(folder, row, tuple(found)) for row, found in zip(manifest, flags)]
