"""The judges of the embedded models: two classifiers of different architectures for images of emoji."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ..files import save_tensors, write_text
from .scenes import BACKGROUNDS, GROUP_OF, GROUPS, OBJECTS, STYLES


NOTHING = "nothing"  # no object can be recognised
HEADS = {
    "object": [*OBJECTS, NOTHING],
    "group": [*GROUPS, NOTHING],
    "style": ["plain", *STYLES],
    "background": list(BACKGROUNDS),
}
LAYERS_PER_LEVEL = 6
_WEIGHTS = "model.safetensors"


class EmojiClassifier(nn.Module):
    """Classifies object, group, style and background of 64 x 64 images.

    Object and group have the additional class `"nothing"` for images without a recognisable object. Without this
    class, a judge would recognise a weapon in one of twelve ruined images, because 5 of 60 objects are weapons.

    Args:
        width (`int`, defaults to 24): Number of channels of the first level.
    """

    architecture = "convolutions"

    def __init__(self, width: int = 24):
        super().__init__()
        self.width = width
        self.stem, features = self._build_stem(width)
        self.heads = nn.ModuleDict({head: nn.Linear(features, len(labels)) for head, labels in HEADS.items()})

    @staticmethod
    def _build_stem(width: int) -> tuple[nn.Module, int]:
        channels = [3, width, 2 * width, 3 * width, 4 * width]
        layers = (
            layer
            for before, after in zip(channels, channels[1:])
            for layer in (
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
        )
        return nn.Sequential(*layers), channels[-1]

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, 64, 64)` in [0, 1] to features `(B, 4 * width)`."""
        return self.levels(pictures)[-1].mean(dim=(2, 3))

    def levels(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Images `(B, 3, 64, 64)` in [0, 1] to four feature maps, 32, 16, 8 and 4 pixels wide."""
        _check_pictures(pictures)
        hidden, levels = pictures * 2 - 1, []
        for start in range(0, len(self.stem), LAYERS_PER_LEVEL):
            hidden = self.stem[start : start + LAYERS_PER_LEVEL](hidden)
            levels.append(hidden)
        return levels

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images `(B, 3, 64, 64)` in [0, 1] to logits `(B, number of labels)` of each head."""
        features = self.features(pictures)
        return {head: layer(features) for head, layer in self.heads.items()}

    @torch.inference_mode()
    def classify(self, pictures: np.ndarray, batch_size: int = 256) -> dict[str, list[str]]:
        """Classifies images.

        Args:
            pictures (`np.ndarray`): `(N, 64, 64, 3)`, `uint8`.
            batch_size (`int`, defaults to 256): Number of images per batch.

        Returns:
            `dict[str, list[str]]`: The most likely label of each image, for each head of `HEADS`.

        Raises:
            `ValueError`: If the images have another type or shape.
        """
        if pictures.dtype != np.uint8:
            raise ValueError(f"pictures are {pictures.dtype}; the classifier takes uint8, 0 to 255")
        self.eval()
        names = {head: [] for head in HEADS}
        for start in range(0, len(pictures), batch_size):
            batch = to_tensor(pictures[start : start + batch_size])
            for head, logits in self(batch).items():
                names[head] += [HEADS[head][i] for i in logits.argmax(dim=1)]
        return names

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        halves = {
            name: value.half() if value.is_floating_point() else value for name, value in self.state_dict().items()
        }
        config = {"architecture": self.architecture, "width": self.width, "labels": HEADS}
        save_tensors(halves, folder / _WEIGHTS)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    @staticmethod
    def from_pretrained(folder: str | Path) -> "EmojiClassifier":
        """Loads a judge of any architecture.

        Raises:
            `ValueError`: If the judge was trained for other labels.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        if config["labels"] != HEADS:
            raise ValueError(f"{folder}: the classifier was trained for other labels than this version's scenes have")
        kinds = {kind.architecture: kind for kind in (EmojiClassifier, SecondEmojiClassifier)}
        model = kinds[config.get("architecture", EmojiClassifier.architecture)](config["width"])
        model.load_state_dict(load_file(folder / _WEIGHTS))
        return model.eval()


class SecondEmojiClassifier(EmojiClassifier):
    """A second judge that checks the first: ConvNeXt blocks (Liu et al., arXiv 2201.03545), images of 96 pixels."""

    architecture = "convnext"
    resolution = 96

    def __init__(self, width: int = 48):
        super().__init__(width)

    @staticmethod
    def _build_stem(width: int) -> tuple[nn.Module, int]:
        widths = (width, 2 * width, 10 * width // 3)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=4), _ChannelNorm(width)]
        for level, (channels, depth) in enumerate(zip(widths, (2, 3, 2))):
            if level:
                layers += [_ChannelNorm(widths[level - 1]), nn.Conv2d(widths[level - 1], channels, 2, stride=2)]
            layers += [_ConvNeXtBlock(channels) for _ in range(depth)]
        return nn.Sequential(*layers), widths[-1]

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, 64, 64)` in [0, 1] to features `(B, 10 * width // 3)`."""
        return self.levels(pictures)[-1].mean(dim=(2, 3))

    def levels(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Images `(B, 3, 64, 64)` in [0, 1] to the last feature map, 6 pixels wide."""
        _check_pictures(pictures)
        shown = F.interpolate(pictures, (self.resolution, self.resolution), mode="bilinear", antialias=True)
        return [self.stem(shown * 2 - 1)]


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of `(B, C, H, W)`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.movedim(1, -1)).movedim(-1, 1)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            _ChannelNorm(channels),
            nn.Conv2d(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Conv2d(4 * channels, channels, 1),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.layers(hidden)


def _check_pictures(pictures: torch.Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1:] != (3, 64, 64):
        raise ValueError(f"pictures have shape {tuple(pictures.shape)}; the classifier takes (B, 3, 64, 64)")


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """`(N, 64, 64, 3)` `uint8` to `(N, 3, 64, 64)` float in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def scene_labels(scenes: list) -> dict[str, torch.Tensor]:
    """The class indices `(N,)` of scenes for each head."""
    columns = {
        "object": [scene.name for scene in scenes],
        "group": [GROUP_OF[scene.name] for scene in scenes],
        "style": [scene.style or "plain" for scene in scenes],
        "background": [scene.background for scene in scenes],
    }
    return {head: torch.tensor([HEADS[head].index(label) for label in labels]) for head, labels in columns.items()}
