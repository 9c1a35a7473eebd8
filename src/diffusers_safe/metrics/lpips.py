"""LPIPS: the perceptual distance between images."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

from ..provenance import fingerprint
from .base import Metric, Quantity
from .loading import alike, checked_file, chosen, load_weights, on_device, read_state
from .resizing import check_sizes, shorter_side, to_tensor
from .trunks import Trunk, trunk_source


# trunk, the compared layers (each a ReLU), their channels
NETS = {
    "alex": ("alexnet", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    "vgg": ("vgg16", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
}
RESIZES = {"esd": lambda image: shorter_side(image, 64), "none": to_tensor}


class LPIPS(Metric):
    """[`PerceptualDistance`] to the original model's image of the same prompt and seed.

    Args:
        net (`str`): `"alex"` or `"vgg"`.
        trunk (`str`): torchvision's weights of AlexNet or VGG-16.
        linear (`str`): The `lpips` package's weights for the same network.
        resize (`str`, defaults to `"none"`): `"esd"`: first resizes the shorter side to 64 pixels, as ESD does;
            numbers with and without are not comparable.

    Raises:
        `ValueError`: If a file is missing or of another network, or a name is unknown.
    """

    name = "lpips"
    compares = True
    same_size = True
    quantities = {"lpips": Quantity("LPIPS to the original", better="lower")}

    def __init__(self, net: str, trunk: str | None, linear: str | None, resize: str = "none"):
        super().__init__()
        self.net, self.resize_name = net, resize
        self.resize = chosen(RESIZES, resize, "lpips_resize")
        self.distance = PerceptualDistance.load(net, trunk, linear)

    def identity(self) -> dict:
        weights = fingerprint(self.distance)
        return {"metric": self.name, "net": self.net, "weights": weights, "resize": self.resize_name}

    @torch.inference_mode()
    def score(
        self, images: Sequence[Image.Image], rows: Sequence[dict], originals: Sequence[Image.Image]
    ) -> list[dict]:
        device = on_device(self.distance)
        pairs = []
        for row, image, original in zip(rows, images, originals):
            check_sizes(self.name, row["id"], image.size, original.size)
            pairs.append(torch.stack([self.resize(image), self.resize(original)]))
        scores = [{}] * len(pairs)
        for places, batch in alike(pairs):
            batch = batch.to(device) / 127.5 - 1
            for place, distance in zip(places, self.distance(batch[:, 0], batch[:, 1]).tolist()):
                scores[place] = {"distance": distance}
        return scores

    def values(self, row: dict, score: dict) -> dict[str, float]:
        return {"lpips": score["distance"]}


class PerceptualDistance(nn.Module):
    """Weighted squared differences of a network's features, normalised over channels, averaged over positions and
    summed over five layers.

    Source: R. Zhang et al., The unreasonable effectiveness of deep features as a perceptual metric, CVPR 2018,
    equation 1; version 0.1 of its weights, whose pixels are shifted and scaled.
    """

    def __init__(self, net: str, trunk: Trunk):
        super().__init__()
        _, self.layers, channels = chosen(NETS, net, "lpips_net")
        self.trunk = trunk
        # Named as in the package's files: lin0.model.1.weight. The identity replaces a dropout.
        self.linear = nn.ModuleDict(
            {
                f"lin{number}": nn.ModuleDict(
                    {"model": nn.Sequential(nn.Identity(), nn.Conv2d(count, 1, 1, bias=False))}
                )
                for number, count in enumerate(channels)
            }
        )
        # For pixels in [-1, 1]; the package's digits of ImageNet's mean and deviation.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    @classmethod
    def load(cls, net: str, trunk: str | None, linear: str | None) -> "PerceptualDistance":
        kind = chosen(NETS, net, "lpips_net")[0]
        wheel = f"{net}.pth of the PyPI package lpips 0.1.4, where it is lpips/weights/v0.1/{net}.pth (pip download)"
        if trunk is None or linear is None:
            lacks = " and ".join(
                name for name, path in {"lpips_trunk": trunk, "lpips_linear": linear}.items() if path is None
            )
            raise ValueError(f"lpips lacks {lacks}; it needs two files: {trunk_source(kind)}, and {wheel}")
        path = checked_file(linear, "lpips_linear", wheel)
        distance = cls(net, Trunk.load(kind, trunk, "lpips_trunk"))
        load_weights(distance.linear, read_state(path), path, wheel)
        return distance

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Distances `(B,)` between two batches of pixels `(B, 3, H, W)` in [-1, 1]."""
        total = 0
        features = [self.trunk((pixels - self.shift) / self.scale, self.layers) for pixels in (first, second)]
        for a, b, linear in zip(*features, self.linear.values()):
            difference = (_normalized(a) - _normalized(b)) ** 2
            total = total + linear["model"](difference).mean(dim=(1, 2, 3))
        return total


def _normalized(features: torch.Tensor) -> torch.Tensor:
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)
