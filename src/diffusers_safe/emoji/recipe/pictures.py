"""Training data of the stages: images that are rendered once, and their latents."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from ...provenance import fingerprint
from ..classifier import to_tensor
from ..render import RESOLUTION, render_many
from ..scenes import Scene, Variation, draw_caption, draw_scene


def load_pictures(
    output_dir: str | Path, count: int, seed: int, variation: Variation
) -> tuple[np.ndarray, list[Scene]]:
    """The training images `(count, 64, 64, 3)` and their scenes, rendered once and stored on disk."""
    path = Path(output_dir) / "cache" / f"pictures-{_digest(variation)}-{seed}-{count}.npy"
    if path.exists():
        rngs = (np.random.default_rng([seed, i]) for i in range(count))
        return np.load(path, mmap_mode="r"), [draw_scene(rng, variation=variation) for rng in rngs]
    pictures = np.empty((count, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    scenes = []
    for start in tqdm(range(0, count, 500), "rendering"):
        size = min(500, count - start)
        pictures[start : start + size], more = render_many(seed, start, size, variation=variation)
        scenes += more
    return _save_array(path, pictures), scenes


def _digest(variation: Variation) -> str:
    return hashlib.sha256(repr(variation).encode()).hexdigest()[:8]


@torch.inference_mode()
def encode_pictures(
    output_dir: str | Path, autoencoder: AutoencoderKL, pictures: np.ndarray, seed: int, variation: Variation
) -> np.ndarray:
    """Mean and standard deviation of the latents, `(N, 2 * channels, 16, 16)` float16, stored on disk."""
    name = f"latents-{_digest(variation)}-{fingerprint(autoencoder)}-{seed}-{len(pictures)}.npy"
    path = Path(output_dir) / "cache" / name
    if path.exists():
        return np.load(path, mmap_mode="r")
    rows = []
    for start in tqdm(range(0, len(pictures), 250), "encoding"):
        batch = (to_tensor(pictures[start : start + 250]) * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(batch).latent_dist
        rows.append(torch.cat([posterior.mean, posterior.std], dim=1).half().numpy())
    return _save_array(path, np.concatenate(rows))


class CaptionedLatents:
    """Training samples of a denoiser: normalised latents and tokenized captions.

    Args:
        moments (`np.ndarray`): Output of [`encode_pictures`].
        scenes (`list[Scene]`): Scenes of the images.
        tokenizer (`CLIPTokenizer`): Tokenizer of the captions.
        scaling_factor (`float`), shift_factor (`float`): As in the autoencoder's config.
    """

    def __init__(
        self,
        moments: np.ndarray,
        scenes: list[Scene],
        tokenizer: CLIPTokenizer,
        scaling_factor: float,
        shift_factor: float = 0.0,
    ):
        self.moments, self.scenes, self.tokenizer = moments, scenes, tokenizer
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor

    def sample(self, rng: np.random.Generator, size: int) -> dict[str, torch.Tensor | list[str]]:
        """`latents` and `noise` `(size, C, 16, 16)`, and `captions` with their `input_ids`; one in ten is empty."""
        chosen = np.sort(rng.integers(len(self.scenes), size=size))
        mean, std = np.split(self.moments[chosen].astype(np.float32), 2, axis=1)
        latents = mean + std * rng.standard_normal(mean.shape, dtype=np.float32)
        captions = ["" if rng.random() < 0.1 else draw_caption(self.scenes[i], rng) for i in chosen]
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {
            "latents": torch.from_numpy((latents - self.shift_factor) * self.scaling_factor),
            "noise": torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)),
            "input_ids": tokens,
            "captions": captions,
        }


@dataclass(frozen=True)
class Lesson:
    """A round of the training of a denoiser.

    Attributes:
        steps (`int`): Number of optimizer steps.
        variation (`Variation`): Of the images.
        batch_size (`int`, defaults to 32): Number of samples per step.
        coarse (`bool`, defaults to `False`): Latents of half the size.
        details (`bool`, defaults to `False`): Noise levels are uniform; otherwise they are high, because those decide
            the content.
        decays (`bool`, defaults to `False`): The learning rate decays to zero.
    """

    steps: int
    variation: Variation
    batch_size: int = 32
    coarse: bool = False
    details: bool = False
    decays: bool = False


# A shift that is no multiple of 4 pixels, the autoencoder's factor, changes all latents, and details of moving objects
# stay blurred. The images therefore vary less from round to round.
NEARLY_UPRIGHT = Variation(sizes=(48.0, 56.0), reach=3.0, turn=4.0, mirrored=True)
MIRRORED = Variation(mirrored=True)
MORE_SKETCHES = Variation(styles=(None, None, None, "sketch", "sketch", "mosaic", "sepia"))


def stratified(rng: np.random.Generator, size: int) -> np.ndarray:
    """`size` numbers in [0, 1), one in each of `size` equal intervals, which reduces the variance of a loss."""
    return (rng.permutation(size) + rng.random(size)) / size


def latent_statistics(moments: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all values of the latents; the `scaling_factor` is 1 / standard deviation."""
    mean, std = (part.astype(np.float64) for part in np.split(moments[:4096], 2, axis=1))
    return float(mean.mean()), math.sqrt(mean.var() + np.square(std).mean())


def _save_array(path: Path, array: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.rename(path)
    return array
