"""The convolutions of AlexNet and VGG, with torchvision's names and numbers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .loading import checked_file, chosen, load_weights, read_state


# Channels of 3 x 3 convolutions; "M" is a maximum over 2 x 2.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
VGG19 = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M")
FILES = {
    "alexnet": "alexnet-owt-7be5be79.pth",
    "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
}


class Trunk(nn.Module):
    """Convolutions without the classifier; layers have torchvision's numbers.

    Args:
        kind (`str`): `"alexnet"`, `"vgg16"` or `"vgg19"`.

    Source: A. Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv 1404.5997;
    K. Simonyan and A. Zisserman, Very deep convolutional networks, arXiv 1409.1556.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.features = nn.Sequential(
            *chosen({"alexnet": _alexnet, "vgg16": lambda: _vgg(VGG16), "vgg19": lambda: _vgg(VGG19)}, kind, "trunk")()
        )

    @classmethod
    def load(cls, kind: str, path: str | Path | None, option: str) -> "Trunk":
        """Loads the weights of one of torchvision's files, without those of the classifier.

        Raises:
            `ValueError`: If the file is missing or of another network.
        """
        path = checked_file(path, option, trunk_source(kind))
        with torch.device("meta"):  # does not initialise weights that are replaced
            trunk = cls(kind)
        trunk.to_empty(device="cpu")
        state = {name: value for name, value in read_state(path).items() if not name.startswith("classifier.")}
        load_weights(trunk, state, path, trunk_source(kind))
        return trunk

    def forward(self, pixels: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """The outputs of `layers`, in order, for normalised pixels `(B, 3, H, W)`."""
        outputs = {}
        for number, layer in enumerate(self.features[: max(layers) + 1]):
            pixels = layer(pixels)
            outputs[number] = pixels
        return [outputs[number] for number in layers]


def trunk_source(kind: str) -> str:
    return f"torchvision's {kind}, https://download.pytorch.org/models/{FILES[kind]}"


def _alexnet() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
    ]


def _vgg(plan: Sequence[int | str]) -> list[nn.Module]:
    layers, channels = [], 3
    for entry in plan:
        if entry == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
            channels = entry
    return layers
