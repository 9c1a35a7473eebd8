"""Training of the autoencoder, which both embedded models share, and of its decoder once more."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from ..architecture import LATENT_CHANNELS, LATENT_SIZE, build_autoencoder
from ..classifier import to_tensor
from .stage import Round, Stage


DECODED_NOISE = 0.6


class AutoencoderLoss(nn.Module):
    """Reconstruction errors of pixels and of their differences to neighbouring pixels, and a weak KL term.

    Latents that are averaged over 2 x 2 positions must decode to the image at half its size (Skorokhodov et al.,
    arXiv 2502.14831). Otherwise high frequencies of the latents carry information that low frequencies could, and a
    diffusion model learns them last. The posterior starts narrow (standard deviation 0.08). With the usual 1 the
    decoder only sees noise at first, and the latents collapse.
    """

    def __init__(self, autoencoder: AutoencoderKL, kl_weight: float = 1e-4, half_size_weight: float = 0.25):
        super().__init__()
        self.autoencoder, self.kl_weight, self.half_size_weight = autoencoder, kl_weight, half_size_weight
        nn.init.constant_(autoencoder.quant_conv.bias[LATENT_CHANNELS:], -5.0)

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The loss for images `(B, 3, 64, 64)` in [-1, 1] and normal noise of the shape of the latents."""
        posterior = self.autoencoder.encode(pictures).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        latents = mean + std * noise
        error = restoration_error(self.autoencoder.decode(latents).sample.float(), pictures)
        half = self.autoencoder.decode(F.avg_pool2d(latents, 2)).sample.float()
        half_error = restoration_error(half, F.avg_pool2d(pictures, 2))
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return error + self.half_size_weight * half_error + self.kl_weight * kl


def restoration_error(restored: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error of pixels, and absolute error of their differences to neighbouring pixels."""
    edges = sum((restored.diff(dim=dim) - pictures.diff(dim=dim)).abs().mean() for dim in (2, 3))
    return (restored - pictures).abs().mean() + (restored - pictures).square().mean() + 0.5 * edges


def autoencoder_stage(pictures: np.ndarray, steps: int, learning_rate: float) -> Stage:
    """The stage that trains the autoencoder on images `(N, 64, 64, 3)`, `uint8`."""

    def make_batch(rng, size):
        batch = _normalized(pictures[np.sort(rng.integers(len(pictures), size=size))])
        noise = rng.standard_normal((size, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), dtype=np.float32)
        return {"pictures": batch, "noise": torch.from_numpy(noise)}

    return Stage(
        "autoencoder",
        AutoencoderLoss(build_autoencoder()),
        [Round(steps, 16, make_batch)],
        learning_rate,
        ema_decay=0.998,
        mixed_precision="bf16",
        identity={"pictures": len(pictures)},
    )


def _normalized(pictures: np.ndarray) -> torch.Tensor:
    return (to_tensor(pictures) * 2 - 1).contiguous(memory_format=torch.channels_last)


class DecoderLoss(nn.Module):
    """Reconstruction errors of images from noisy latents; only the decoder is trained.

    Sampled latents are never exact. A decoder that has seen noise forgives small errors (Zheng et al.,
    arXiv 2510.11690), and latents, and so the denoisers, stay as they are.
    """

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = autoencoder.post_quant_conv, autoencoder.decoder

    def forward(self, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        return restoration_error(self.decoder(self.post_quant_conv(latents)).float(), pictures)


def decoder_stage(
    autoencoder: AutoencoderKL,
    pictures: np.ndarray,
    deviation: float,
    steps: int,
    learning_rate: float,
    identity: dict,
) -> Stage:
    """The stage that trains the decoder of a trained autoencoder, in place.

    Args:
        autoencoder (`AutoencoderKL`): Its encoder does not change.
        pictures (`np.ndarray`): Images `(N, 64, 64, 3)`, `uint8`.
        deviation (`float`): Standard deviation of all latents; that of the noise is up to `DECODED_NOISE` times it.
        steps (`int`), learning_rate (`float`), identity (`dict`): As [`Stage`] takes them.
    """

    @torch.no_grad()
    def make_batch(rng, size):
        batch = _normalized(pictures[np.sort(rng.integers(len(pictures), size=size))])
        posterior = autoencoder.encode(batch).latent_dist
        deviations = torch.from_numpy(DECODED_NOISE * deviation * rng.random((size, 1, 1, 1), dtype=np.float32))
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32))
        return {"latents": posterior.mean + posterior.std.hypot(deviations) * noise, "pictures": batch}

    return Stage(
        "decoder",
        DecoderLoss(autoencoder),
        [Round(steps, 16, make_batch)],
        learning_rate,
        ema_decay=0.998,
        mixed_precision="bf16",
        identity=identity,
    )
