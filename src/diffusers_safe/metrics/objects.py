"""Whether a classifier recognises what the prompt asks for: an object or a style."""

from collections import defaultdict
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..images import to_rgb
from ..provenance import fingerprint
from .base import Metric, Quantity
from .loading import load_pretrained, on_device


KEPT = 5  # classes stored for each image


class Classification(Metric):
    """Top-1 and top-5 accuracy of a classifier for the class that the prompt asks for.

    This class is one of the row's labels: a class name of the classifier, in any case, one of the names in it that are
    separated by commas ("chain saw, chainsaw"), or its number. Rows without the label do not count.

    Args:
        model (`str`): Folder or Hub id of an image classifier, such as `"microsoft/resnet-50"`.
        label (`str`): Label of the rows that names the class.
        name (`str`, defaults to `"objects"`): Name of the metric.
        erased (`Sequence[str]`, *optional*): Erased classes. Images that ask for one of them are counted separately,
            by top-1 accuracy, as in ESD; for other images higher is better.

    Raises:
        `ValueError`: If the model cannot be loaded, or does not have an erased class.
    """

    def __init__(self, model: str | None, label: str, name: str = "objects", erased: Sequence[str] = ()):
        super().__init__()
        self.name, self.label = name, label
        of, better = (f"other {name}", "higher") if erased else (name, None)
        self.quantities = {
            f"{name}_top1": Quantity(f"{of} recognised", "%", better),
            f"{name}_top5": Quantity(f"{of} among the first 5", "%", better),
        }
        if erased:
            gone = Quantity(f"erased {name} recognised", "%", "lower", of_concept=True, note=", ".join(erased))
            self.quantities = {f"{name}_erased": gone, **self.quantities}
        option, what = f"{name}_model", "an image classifier, for objects microsoft/resnet-50"
        if model is None:
            raise ValueError(f"{option}: none given; give {what}, or a local folder")
        self.model = load_pretrained(AutoModelForImageClassification, model, option, what)
        self.processor = load_pretrained(AutoImageProcessor, model, option, what, backend="pil")
        self.classes = [self.model.config.id2label[number] for number in range(self.model.config.num_labels)]
        self.numbers = _numbers(self.classes)
        self.erased = {self.number(label): label for label in erased}

    def identity(self) -> dict:
        processor = self.processor.to_dict()
        return {"metric": self.name, "model": fingerprint(self.model), "processor": processor, "classes": self.classes}

    def check(self, rows: Sequence[dict]) -> None:
        asked = [row["labels"][self.label] for row in rows if self.label in row.get("labels", {})]
        if not asked:
            known = sorted({key for row in rows for key in row.get("labels", {})})
            raise ValueError(
                f"{self.name}_label '{self.label}': no image has this label; they have {', '.join(known) or 'none'}"
            )
        numbers = {self.number(label) for label in dict.fromkeys(asked)}
        for number, label in self.erased.items():
            if number not in numbers:
                raise ValueError(f"{self.name}_erased '{label}': no image asks for it")

    def number(self, label: str | int) -> int:
        """The number of a class from its name.

        Raises:
            `ValueError`: If no class has this name, or several have.
        """
        if isinstance(label, int) and 0 <= label < len(self.classes):
            return label
        found = self.numbers.get(_plain(str(label)), [])
        if len(found) > 1:
            raise ValueError(f"{self.name} '{label}': names the classes {', '.join(map(str, found))}; give the number")
        if not found:
            close = get_close_matches(_plain(str(label)), self.numbers, n=5, cutoff=0.5) or list(self.numbers)[:5]
            raise ValueError(
                f"{self.name} '{label}': none of the {len(self.classes)} classes; similar: {', '.join(close)}"
            )
        return found[0]

    @torch.inference_mode()
    def score(
        self, images: Sequence[Image.Image], rows: Sequence[dict], originals: Sequence[Image.Image] | None = None
    ) -> list[dict]:
        device = on_device(self.model)
        pixels = self.processor(images=list(map(to_rgb, images)), return_tensors="pt")["pixel_values"].to(device)
        shares, numbers = self.model(pixel_values=pixels).logits.softmax(dim=-1).topk(min(KEPT, len(self.classes)))
        return [
            {"classes": classes, "probabilities": probabilities}
            for classes, probabilities in zip(numbers.tolist(), shares.tolist())
        ]

    def values(self, row: dict, score: dict) -> dict[str, float]:
        if self.label not in row.get("labels", {}):
            return {}
        asked = self.number(row["labels"][self.label])
        first = float(score["classes"][0] == asked)
        if asked in self.erased:
            return {f"{self.name}_erased": first}
        return {f"{self.name}_top1": first, f"{self.name}_top5": float(asked in score["classes"])}

    def seen(self, row: dict, score: dict) -> str:
        """The first name of the most likely class, for rows that count."""
        if self.label not in row.get("labels", {}):
            return ""
        return self.classes[score["classes"][0]].split(",")[0]

    def details(self) -> dict:
        """`label`, `erased`, and `classes`: label -> numbers of `images` and of correct ones by `top1` and `top5`."""
        found = defaultdict(lambda: {"images": 0, "top1": 0, "top5": 0})
        for row, score in zip(self.rows, self.scores):
            if (label := row.get("labels", {}).get(self.label)) is not None:
                entry, asked = found[str(label)], self.number(label)
                entry["images"] += 1
                entry["top1"] += int(score["classes"][0] == asked)
                entry["top5"] += int(asked in score["classes"])
        return {"label": self.label, "erased": list(self.erased.values()), "classes": dict(found)}


def _plain(label: str) -> str:
    return label.strip().lower().replace("_", " ")


def _numbers(classes: Sequence[str]) -> dict[str, list[int]]:
    """Name -> the numbers of the classes with this name: complete names first, then names between commas."""
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        numbers.setdefault(_plain(name), []).append(number)
    parts: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        for part in map(_plain, name.split(",")):
            if part not in numbers:
                parts.setdefault(part, []).append(number)
    return {**numbers, **parts}
