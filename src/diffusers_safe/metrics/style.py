"""The distance in style between images and references, from Gram matrices of VGG's features.

For a classifier of styles, see [`Classification`](objects.py) with the label that names the style.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..images import open_rgb
from ..provenance import fingerprint
from .base import Metric, Quantity
from .loading import chosen, digest, image_files, on_device
from .resizing import shorter_side, to_tensor
from .trunks import Trunk


LAYERS = (0, 2, 5, 7, 10)  # VGG-19's first five convolutions, before their ReLUs
SCALE = 1e6  # ESD's weight of the loss
RESIZES = {"esd": lambda image: shorter_side(image, 512), "none": to_tensor}


class GramDistance(Metric):
    """10^6 times the Gram loss: mean squared differences of Gram matrices, over VGG-19's first five convolutions.

    Without references each image is compared with the original model's image of the same prompt and seed, as in ESD.
    With references it is the average of the losses to all of them.

    Args:
        trunk (`str`): torchvision's weights of VGG-19.
        references (`str`, *optional*): Folder of images of the style.
        resize (`str`, defaults to `"esd"`): `"esd"` resizes the shorter side to 512 pixels; `"none"`: no resize.

    Raises:
        `ValueError`: If the weights are missing or of another network, or there are no references in the folder.

    Source: L. Gatys et al., Image style transfer using convolutional neural networks, CVPR 2016, equations 3 to 5,
    with the normalisation of ESD's evaluation: a Gram matrix is divided by its features' number of values.
    """

    name = "gram"

    def __init__(self, trunk: str | None, references: str | Path | None = None, resize: str = "esd"):
        super().__init__()
        self.compares = references is None
        to = "the original" if self.compares else "the style"
        better = "lower" if self.compares else None
        self.quantities = {"gram": Quantity(f"Gram loss to {to}, 10^6", better=better, of_concept=not self.compares)}
        self.resize_name, self.resize = resize, chosen(RESIZES, resize, "gram_resize")
        self.files = [] if references is None else image_files(references, "style_references")
        self.trunk = Trunk.load("vgg19", trunk, "style_trunk")
        self.summary = None  # of the references: mean Gram matrices, and the average loss to these

    def identity(self) -> dict:
        references = digest(b"".join(path.read_bytes() for path in self.files)) if self.files else None
        weights = fingerprint(self.trunk)
        return {"metric": self.name, "weights": weights, "resize": self.resize_name, "references": references}

    @torch.inference_mode()
    def score(
        self, images: Sequence[Image.Image], rows: Sequence[dict], originals: Sequence[Image.Image] | None = None
    ) -> list[dict]:
        if self.compares:
            pairs = zip(images, originals)
            return [{"loss": gram_loss(self._grams(image), self._grams(original))} for image, original in pairs]
        if self.summary is None:
            self.summary = self._summary()
        means, spread = self.summary
        # mean of |G - R|^2 over R = |G - mean R|^2 + mean |R - mean R|^2
        return [{"loss": gram_loss(self._grams(image), means) + spread} for image in images]

    def values(self, row: dict, score: dict) -> dict[str, float]:
        return {"gram": SCALE * score["loss"]}

    def _grams(self, image: Image.Image) -> list[torch.Tensor]:
        device = on_device(self.trunk)
        mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
        deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]
        pixels = (self.resize(image).to(device) / 255 - mean) / deviation
        return [gram_matrix(features[0]) for features in self.trunk(pixels[None], LAYERS)]

    def _summary(self) -> tuple[list[torch.Tensor], float]:
        sums, squares = None, 0.0
        for path in self.files:
            grams = self._grams(open_rgb(path))
            sums = grams if sums is None else [total + gram for total, gram in zip(sums, grams)]
            squares += sum(float((gram.double() ** 2).mean()) for gram in grams)
        means = [total / len(self.files) for total in sums]
        return means, squares / len(self.files) - sum(float((gram.double() ** 2).mean()) for gram in means)


def gram_matrix(features: torch.Tensor) -> torch.Tensor:
    """The Gram matrix `(C, C)` of features `(C, H, W)`, divided by C * H * W."""
    rows = features.flatten(1)
    return rows @ rows.T / features.numel()


def gram_loss(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Mean squared differences, summed over layers."""
    return sum(float(((a.double() - b.double()) ** 2).mean()) for a, b in zip(first, second))
