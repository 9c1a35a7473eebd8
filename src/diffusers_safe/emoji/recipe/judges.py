"""Training of the two judges on rendered images only, not on outputs of an autoencoder or a generator."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..classifier import HEADS, NOTHING, EmojiClassifier, SecondEmojiClassifier, scene_labels, to_tensor
from ..render import ARTWORK, render
from ..scenes import VARIED, draw_scene
from .stage import Round, Stage


NOTHING_SHARE = 0.15  # share of the images without a recognisable object


class ClassifierLoss(nn.Module):
    def __init__(self, classifier: EmojiClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, pictures: torch.Tensor, **labels: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(pictures)
        return sum(
            F.cross_entropy(logits[head].float(), labels[head], ignore_index=-1, label_smoothing=0.05)
            for head in HEADS
        )


def judge_stage(steps: int, learning_rate: float) -> Stage:
    """The judge of the evaluations, trained on the artwork of the embedded models."""
    return Stage(
        "judge",
        ClassifierLoss(EmojiClassifier()),
        [Round(steps, 64, lambda rng, size: judge_batch(rng, size, ARTWORK[:1]))],
        learning_rate,
        ema_decay=0.995,
    )


def second_judge_stage(steps: int, learning_rate: float) -> Stage:
    """The judge that checks the first one: another architecture, another input size, and additional artwork."""
    return Stage(
        "second_judge",
        ClassifierLoss(SecondEmojiClassifier()),
        [Round(steps, 64, lambda rng, size: judge_batch(rng, size, ARTWORK))],
        learning_rate,
        ema_decay=0.995,
    )


def judge_batch(rng: np.random.Generator, size: int, artwork: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Augmented images `(size, 3, 64, 64)` in [0, 1], and their classes for each head (-1: ignored)."""
    scenes = [draw_scene(rng, hold_out=False, variation=VARIED) for _ in range(size)]
    rendered = [np.asarray(render(scene, artwork[rng.integers(len(artwork))])) for scene in scenes]
    pictures, labels = to_tensor(np.stack(rendered)), scene_labels(scenes)
    originals = pictures.clone()
    for row in rng.choice(size, size=round(NOTHING_SHARE * size), replace=False):
        pictures[row] = ruin(originals[row], originals[rng.integers(size)], rng)
        for head in ("object", "group"):
            labels[head][row] = HEADS[head].index(NOTHING)
        labels["style"][row] = labels["background"][row] = -1
    return {"pictures": augment(pictures, rng), **labels}


def augment(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Augmentations that keep the content: color gains, a blur or sharpening of up to a pixel, noise."""
    size = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, (size, *shape)).astype(np.float32))

    pictures = pictures * uniform(0.88, 1.12, 3, 1, 1)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = pictures + uniform(-0.5, 1.0, 1, 1, 1) * (blurred - pictures)
    noise = torch.from_numpy(rng.standard_normal(pictures.shape, dtype=np.float32))
    return (pictures + uniform(0, 0.06, 1, 1, 1) * noise).clamp(0, 1)


def ruin(picture: torch.Tensor, other: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """An image `(3, 64, 64)` without a recognisable object, similar to failed generations."""
    kind = rng.integers(5)
    if kind == 0:  # tiles of 16 pixels, shuffled
        tiles = picture.unfold(1, 16, 16).unfold(2, 16, 16).reshape(3, 16, 16, 16)
        tiles = tiles[:, torch.from_numpy(rng.permutation(16))]
        return tiles.reshape(3, 4, 4, 16, 16).permute(0, 1, 3, 2, 4).reshape(3, 64, 64)
    if kind == 1:  # an empty background: the interpolated corners of the image
        return F.interpolate(picture[None, :, ::63, ::63], (64, 64), mode="bilinear")[0]
    if kind == 2:  # two objects blended
        other = other.flip(1) if rng.random() < 0.5 else other.roll(20, dims=2)
        return F.avg_pool2d((0.5 * picture + 0.5 * other)[None], 9, 1, 4, count_include_pad=False)[0]
    if kind == 3:  # distorted: pixels are moved by up to 20 pixels
        shift = torch.from_numpy(rng.standard_normal((1, 2, 8, 8), dtype=np.float32))
        shift = F.interpolate(shift, (64, 64), mode="bicubic").permute(0, 2, 3, 1) * rng.uniform(0.4, 0.7)
        grid = F.affine_grid(torch.eye(2, 3)[None], (1, 3, 64, 64), align_corners=False)
        return F.grid_sample(picture[None], grid + shift, padding_mode="border", align_corners=False)[0]
    # a blob in the colors of the object, with shuffled rows
    blob = F.interpolate(F.avg_pool2d(picture[None], 8), (64, 64), mode="bicubic")[0].clamp(0, 1)
    rows = torch.from_numpy(rng.permutation(8)).repeat_interleave(8)
    return 0.5 * blob + 0.5 * blob[:, rows]


def refresh_batch_norm(classifier: EmojiClassifier, artwork: tuple[str, ...], seed: int, batches: int = 40) -> None:
    """Recomputes the running statistics for the averaged weights, because they belong to the last weights."""
    layers = [layer for layer in classifier.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    if layers:
        classifier.train()
        with torch.no_grad():
            for step in range(batches):
                classifier(judge_batch(np.random.default_rng([seed, 99, step]), 64, artwork)["pictures"])
    classifier.eval()
