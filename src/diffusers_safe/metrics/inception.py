"""The Inception v3 of the FID, whose weights were ported from TensorFlow's inception-2015-12-05.

It differs from torchvision's network in three points: averages at the border ignore the padding, the last block takes
a maximum instead of an average, and there are 1008 classes and no auxiliary classifier.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from .loading import checked_file, load_weights, read_state


FILE = "pt_inception-2015-12-05-6726825d.pth"
SOURCE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
FEATURES = 2048


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU; `kernel` of height and width, padded to keep the size unless `padding` is 0."""

    def __init__(self, before: int, after: int, kernel: tuple[int, int], stride: int = 1, padding: int | None = None):
        super().__init__()
        pad = tuple(side // 2 for side in kernel) if padding is None else padding
        self.conv = nn.Conv2d(before, after, kernel, stride=stride, padding=pad, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of branches whose outputs are concatenated.

    Args:
        before (`int`): Input channels.
        branches (`dict[str, list]`): Name of a branch -> its convolutions: (channels, kernel). Several are numbered
            from 1. Two kernels are two convolutions of the same input, `a` and `b`.
        pool (`str`): Pooling of the last branch over 3 x 3 positions, `"average"` or `"maximum"`.
        pool_channels (`int`): Channels of the convolution after it; 0 for none.
        stride (`int`, defaults to 1): Stride of the last convolution of each branch and of the pool. With 2 there is
            no padding.
    """

    def __init__(self, before: int, branches: dict[str, list], pool: str, pool_channels: int, stride: int = 1):
        super().__init__()
        self.pool, self.stride = pool, stride
        self.steps = []
        for branch, convolutions in branches.items():
            channels, names = before, []
            for number, (after, *kernels) in enumerate(convolutions, 1):
                last = number == len(convolutions)
                name = branch if len(convolutions) == 1 else f"{branch}_{number}"
                halves = [f"{name}{letter}" for letter in ("ab" if len(kernels) > 1 else [""])]
                for half, kernel in zip(halves, kernels):
                    shrinks = last and stride > 1
                    self.add_module(half, Convolution(channels, after, kernel, *((stride, 0) if shrinks else ())))
                names.append(halves)
                channels = after
            self.steps.append(names)
        if pool_channels:
            self.branch_pool = Convolution(before, pool_channels, (1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = []
        for names in self.steps:
            result = x
            for halves in names:
                result = torch.cat([self.get_submodule(half)(result) for half in halves], dim=1)
            results.append(result)
        pad = 1 if self.stride == 1 else 0
        if self.pool == "average":
            pooled = functional.avg_pool2d(x, 3, self.stride, pad, count_include_pad=False)
        else:
            pooled = functional.max_pool2d(x, 3, self.stride, pad)
        results.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(results, dim=1)


class FIDInception(nn.Module):
    """Computes the 2048 features before the classifier.

    Source: C. Szegedy et al., Rethinking the Inception architecture, CVPR 2016; M. Heusel et al., GANs trained by a
    two time-scale update rule converge to a local Nash equilibrium, NeurIPS 2017 (the FID).
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2, padding=0)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), padding=0)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), padding=0)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = Mixed(
            288,
            {"branch3x3": [(384, (3, 3))], "branch3x3dbl": [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))]},
            "maximum",
            0,
            stride=2,
        )
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = Mixed(
            768,
            {
                "branch3x3": [(192, (1, 1)), (320, (3, 3))],
                "branch7x7x3": [(192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))],
            },
            "maximum",
            0,
            stride=2,
        )
        self.Mixed_7b = _block_e(1280, "average")
        self.Mixed_7c = _block_e(2048, "maximum")
        self.fc = nn.Linear(FEATURES, 1008)

    @classmethod
    def load(cls, path: str | Path | None, option: str = "fid_weights") -> "FIDInception":
        """Loads the weights that pytorch-fid and torch-fidelity publish.

        Raises:
            `ValueError`: If the file is missing or of another network.
        """
        path = checked_file(path, option, f"the FID's Inception, {SOURCE}")
        with torch.device("meta"):  # does not initialise weights that are replaced
            model = cls()
        model.to_empty(device="cpu")
        load_weights(model, read_state(path), path, f"the FID's Inception ({FILE})")
        return model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features `(B, 2048)` of pixels `(B, 3, 299, 299)` in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = functional.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, 2)
        for block in "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split():
            x = self.get_submodule(f"Mixed_{block}")(x)
        return x.mean(dim=(2, 3))


def _block_a(before: int, pool_channels: int) -> Mixed:
    branches = {
        "branch1x1": [(64, (1, 1))],
        "branch5x5": [(48, (1, 1)), (64, (5, 5))],
        "branch3x3dbl": [(64, (1, 1)), (96, (3, 3)), (96, (3, 3))],
    }
    return Mixed(before, branches, "average", pool_channels)


def _block_c(narrow: int) -> Mixed:
    branches = {
        "branch1x1": [(192, (1, 1))],
        "branch7x7": [(narrow, (1, 1)), (narrow, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(narrow, (1, 1)), (narrow, (7, 1)), (narrow, (1, 7)), (narrow, (7, 1)), (192, (1, 7))],
    }
    return Mixed(768, branches, "average", 192)


def _block_e(before: int, pool: str) -> Mixed:
    branches = {
        "branch1x1": [(320, (1, 1))],
        "branch3x3": [(384, (1, 1)), (384, (1, 3), (3, 1))],
        "branch3x3dbl": [(448, (1, 1)), (384, (3, 3)), (384, (1, 3), (3, 1))],
    }
    return Mixed(before, branches, pool, 192)
