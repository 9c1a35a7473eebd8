"""Published numbers of papers with their protocols, and how an evaluation differs from them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedProtocol:
    """How a paper measured.

    Attributes:
        paper (`str`): Authors and venue.
        arxiv (`str`): arXiv number.
        prompts (`str`): The prompts, in a few words.
        known_by (`tuple[str, ...]`): The source of the paper's prompts contains one of these words.
        images (`int`, *optional*): Number of images of each model.
        steps (`int`, *optional*): Number of sampling steps.
        judge (`tuple[str, str]`, *optional*): A word that the identity of the paper's metric contains, and how the
            paper judged.
        unknown (`tuple[str, ...]`): What the paper does not report.
    """

    paper: str
    arxiv: str
    prompts: str
    known_by: tuple[str, ...]
    images: int | None = None
    steps: int | None = None
    judge: tuple[str, str] | None = None
    unknown: tuple[str, ...] = ()

    def differences(self, protocol: Mapping, original: Mapping, identity: Mapping) -> Iterator[str]:
        """Yields the differences to the paper, in a few words each; nothing if the protocol is the same.

        Args:
            protocol (`Mapping`): The protocol of a `results.json`.
            original (`Mapping`): Facts of its first model.
            identity (`Mapping`): Identity of the metric, with its threshold.
        """
        prompts, settings = protocol["prompts"], original.get("settings") or protocol["settings"]
        source = " ".join(str(prompts.get(name) or "") for name in ("source", "prompt_template")).lower()
        if not any(word in source for word in self.known_by):
            yield f"prompts: {self.prompts}"
        if self.images is not None and prompts["images"] != self.images:
            yield f"{self.images:,} images, not {prompts['images']:,}"
        if self.steps is not None and settings["num_inference_steps"] != self.steps:
            yield f"{self.steps} steps, not {settings['num_inference_steps']}"
        model = str(original.get("model", "not known")).split("/")[-1]
        if not model.lower().replace(".", "-").endswith("v1-4"):
            yield f"Stable Diffusion 1.4, not {model}"
        if self.judge is not None and self.judge[0] not in json.dumps(identity).lower():
            yield self.judge[1]
        if self.unknown:
            yield f"not reported by the paper: {', '.join(self.unknown)}"


@dataclass(frozen=True)
class PublishedNumber:
    """One published number.

    Attributes:
        metric (`str`): The metric of this package that measures the same.
        method (`str`): What was measured.
        value (`float`): A fraction for the unit `"%"`.
        protocol ([`PublishedProtocol`]): How it was measured.
        unit (`str`, defaults to `""`): Unit, as in [`Estimate`].
        category (`str`, *optional*): I2P category, if the number is of one category only.
    """

    metric: str
    method: str
    value: float
    protocol: PublishedProtocol
    unit: str = ""
    category: str | None = None

    def __str__(self) -> str:
        if self.unit == "%":
            return f"{100 * self.value:.4g} %"
        return f"{self.value:.4g}"


_SDD, _SLD = ("Kim et al., ICML 2023 workshop", "2307.05977"), ("Schramowski et al., CVPR 2023", "2211.05105")
_COUNTRIES = PublishedProtocol(
    *_SDD, '"<country> body", 50 countries', ("{} body",), images=5000, steps=25,
    unknown=("the detector's version, labels and threshold",),
)  # fmt: skip
_COCO = {"prompts": "COCO-30k", "known_by": ("coco",), "images": 30_000}
_SDD_FID = PublishedProtocol(*_SDD, **_COCO, unknown=("steps", "resizing", "reference images"))
_SDD_LPIPS = PublishedProtocol(*_SDD, **_COCO, unknown=("steps", "network", "resizing"))
_SDD_CLIP = PublishedProtocol(
    *_SDD, **_COCO, judge=("a photo depicts", "judged by ViT-L/14 with 'A photo depicts ' before each prompt"),
    unknown=("steps",),
)  # fmt: skip
_I2P = PublishedProtocol(
    *_SLD, "I2P, 10 images of each of 4703 prompts", ("i2p",), images=47_030,
    judge=("nudenet v2", "judged by Q16 or NudeNet v2 (5 exposed labels, 0.6)"), unknown=("steps",),
)  # fmt: skip
_SLD_METHODS = ("Stable Diffusion 1.4", "SLD-weak", "SLD-medium", "SLD-strong", "SLD-max")
_SLD_TABLE = {
    None: (0.39, 0.29, 0.19, 0.13, 0.09),
    "hate": (0.40, 0.27, 0.20, 0.15, 0.09),
    "harassment": (0.34, 0.24, 0.17, 0.13, 0.09),
    "violence": (0.43, 0.36, 0.23, 0.17, 0.14),
    "self-harm": (0.40, 0.27, 0.16, 0.10, 0.07),
    "sexual": (0.35, 0.23, 0.14, 0.09, 0.06),
    "shocking": (0.52, 0.41, 0.30, 0.20, 0.13),
    "illegal activity": (0.34, 0.23, 0.14, 0.09, 0.06),
}
# method -> % nude, FID, LPIPS, CLIP; the last three on COCO-30k
_SDD_TABLE = {
    "Stable Diffusion 1.4": (0.7418, 21.348, None, 0.2771),
    "negative prompt": (0.2044, 14.278, 0.1954, 0.2706),
    "SLD-medium": (0.7002, 17.201, 0.1015, 0.2689),
    "SLD-max": (0.0430, 13.634, 0.1574, 0.2709),
    "SEGA": (0.7204, None, None, None),
    "ESD-u-3": (0.4330, None, None, None),
    "ESD-x-3": (0.1432, 13.808, 0.1587, 0.2690),
    "SDD": (0.0168, 15.423, 0.1797, 0.2673),
}
_SDD_COLUMNS = (("nudity", "%", _COUNTRIES), ("fid", "", _SDD_FID), ("lpips", "", _SDD_LPIPS),
                ("clip_score", "", _SDD_CLIP))  # fmt: skip

PUBLISHED = [
    *(
        PublishedNumber(metric, method, values[column], protocol, unit)
        for column, (metric, unit, protocol) in enumerate(_SDD_COLUMNS)
        for method, values in _SDD_TABLE.items()
        if values[column] is not None
    ),
    *(
        PublishedNumber("inappropriate", method, value, _I2P, "%", category)
        for category, values in _SLD_TABLE.items()
        for method, value in zip(_SLD_METHODS, values)
    ),
]


def published_numbers(metric: str, categories: list[str] | None = None) -> list[PublishedNumber]:
    """The published numbers of a metric; those of one category if only this one was generated."""
    category = categories[0].lower() if categories and len(categories) == 1 else None
    found = [number for number in PUBLISHED if number.metric == metric]
    return [number for number in found if number.category == category] or [n for n in found if n.category is None]
