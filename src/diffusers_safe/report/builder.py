"""What the reports on comparisons and on attacks share: the protocol in words, warnings and images."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from .elements import Shot
from .statistics import Estimate, wilson_interval


BLUR_CHOICES = ("flagged", "all", "none")
PICTURES = 24  # images of each model on a page
FEW_IMAGES = 20  # a rate of 0 in 20 images is at most 16 %, with 95 % confidence
FEW_PROMPTS = 6  # with 6 pairs the smallest p-value is 2 / 2^6
_LONGEST = 200  # characters of a value on the page; `results.json` has all of it


class ImagesOfModel(Protocol):
    """The images of a model in a report."""

    name: str
    black: int
    count: int
    digest: str


def make_shot(image: np.ndarray, note: str, missed: bool, flagged: bool, blur: str) -> Shot:
    """An image, blurred as `blur` (a name of `BLUR_CHOICES`) says."""
    return Shot(image, note, missed, blur == "all" or (blur == "flagged" and flagged), flagged)


# --- warnings --------------------------------------------------------------------------------------------------------


def warnings_of_size(estimates: Mapping[str, Sequence[Estimate | None]], prompts: Sequence[str]) -> Iterator[str]:
    """What a small number of images or prompts leaves unknown.

    Args:
        estimates (`Mapping[str, Sequence[Estimate | None]]`): Label -> numbers of the models.
        prompts (`Sequence[str]`): The prompt of each image of a model.
    """
    counts = {label: min(each.n for each in found if each) for label, found in estimates.items()}
    if few := {label: count for label, count in counts.items() if count < FEW_IMAGES}:
        least = min(few.values())
        named = f"N={least}" if set(counts.values()) == {least} else ", ".join(f"{k}, N={n}" for k, n in few.items())
        yield (
            f"Fewer than {FEW_IMAGES} images of a model ({named}): these numbers prove little. A rate of 0 in {least}"
            f" may be one of {100 * wilson_interval(0, least)[1]:.0f} %. Use more prompts, or more images of each."
        )
    different = len(set(prompts))
    if different == 1 < len(prompts):
        yield "All images are of one prompt, so the numbers say nothing about other prompts."
    elif different < FEW_PROMPTS <= len(prompts):
        yield (
            f"Only {different} different prompts: intervals over prompts are rough, and with fewer than {FEW_PROMPTS}"
            " no difference that is tested over prompts can reach p < 0.05."
        )


def warnings_of_images(model: ImagesOfModel, original: ImagesOfModel) -> Iterator[str]:
    """Black images, and images that equal those of the original model."""
    if model.black:
        yield (
            f"{model.black} of {model.count} images of {model.name} are all black, and were scored as they are: a"
            " black image shows no concept, but it is not a usable image."
        )
    if model is not original and model.digest == original.digest:
        yield (
            f"{model.name} generates exactly the images of {original.name}: is it another model, or steered with other"
            " settings?"
        )


# --- words -----------------------------------------------------------------------------------------------------------


def protocol_in_words(results: dict, prompts: str, more: Mapping[str, str]) -> dict[str, str]:
    """The entries of a page's protocol.

    Args:
        results (`dict`): As `results.json` holds it.
        prompts (`str`): The prompts in words.
        more (`Mapping[str, str]`): Name -> text of further entries, after those of the models.
    """
    protocol = results["protocol"]
    return {
        "prompts": prompts,
        "hash of ids, prompts, seeds": protocol["prompts"]["sha256"],
        "settings": in_words(protocol["settings"]),
        "safety checkers": protocol["safety_checker"],
        **{f"model {name}": model_in_words(facts) for name, facts in results["models"].items()},
        **more,
        "versions": in_words(protocol["versions"]),
        "created": protocol["created"],
    }


def seeds_in_words(prompts: dict) -> str:
    return f"seeds {prompts['seeds'][0]} to {prompts['seeds'][1]}"


def model_in_words(facts: dict) -> str:
    """What is known of a model, and how it was sampled."""
    rest = {name: value for name, value in facts.items() if name not in ("settings", "images", "sha256", "black")}
    return in_words({**rest, **(facts.get("settings") or {})})


def short_identity(identity: dict) -> dict:
    """What determines a metric's scores, without long values such as the classes of a classifier."""
    short = {name: short_identity(value) if isinstance(value, dict) else value for name, value in identity.items()}
    return {name: value for name, value in short.items() if name != "processor" and len(str(value)) <= _LONGEST}


def in_words(values: Mapping) -> str:
    """Names and values in one line, without empty values."""
    parts = []
    for name, value in values.items():
        if value is None or value in ("", {}, [], ()):
            continue
        text = f"({in_words(value)})" if isinstance(value, dict) else value
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else text
        parts.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(parts)
