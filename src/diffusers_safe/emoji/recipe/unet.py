"""Training of the UNet of the diffusion model and its text encoder."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..architecture import build_scheduler, build_text_encoder, build_tokenizer, build_unet
from .pictures import CaptionedLatents, stratified
from .stage import Batch, Round, Stage


class UNetLoss(nn.Module):
    """Epsilon prediction of the UNet; the text encoder is trained with it.

    The loss is weighted by 1 / alphas_cumprod, which makes it the loss of v-prediction (Salimans and Ho,
    arXiv 2202.00512). The content of 16 x 16 latents is determined at the highest noise levels. There the unweighted
    loss hardly depends on the caption, and the model would learn the content last.
    """

    def __init__(self, text_encoder: nn.Module, unet: nn.Module):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.register_buffer("alphas_cumprod", build_scheduler().alphas_cumprod, persistent=False)

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward is slow in bfloat16 on a CPU
            prompt_embeds = self.text_encoder(input_ids=input_ids).last_hidden_state
            noise_pred = self.unet(noisy, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        error = (noise_pred.float() - noise).square().mean(dim=(1, 2, 3))
        return (error / self.alphas_cumprod[timesteps]).mean()


def unet_stage(
    data: CaptionedLatents,
    centered: CaptionedLatents,
    coarse_rounds: list[int],
    rounds: list[int],
    detail_rounds: list[int],
    learning_rate: float,
    identity: dict,
    compiled: bool = False,
) -> Stage:
    """The stage that trains the UNet: rounds on latents of half the size, then rounds on full latents.

    Half of the timesteps are above 750, where the caption matters. In the rounds of details they are uniform, and the
    objects are in the middle, of one size: a shift by less than the 4 pixels of a latent changes all latents, and the
    model would have to learn each object in each such place.
    """

    def make_batch(rng: np.random.Generator, size: int, details: bool = False) -> Batch:
        uniform = stratified(rng, size)
        timesteps = 999.99 * (uniform if details else 1 - uniform**2)
        batch = (centered if details else data).sample(rng, size)
        del batch["captions"]
        return {**batch, "timesteps": torch.from_numpy(timesteps.astype(np.int64))}

    def make_coarse_batch(rng: np.random.Generator, size: int) -> Batch:
        return {
            **(batch := make_batch(rng, size)),
            "latents": half_size(batch["latents"]),
            "noise": half_size(batch["noise"]),
        }

    return Stage(
        "unet",
        UNetLoss(build_text_encoder(build_tokenizer()), build_unet()),
        [
            *(Round(steps, 64, make_coarse_batch) for steps in coarse_rounds),
            *(Round(steps, 32, make_batch) for steps in rounds),
            *(Round(steps, 32, partial(make_batch, details=True)) for steps in detail_rounds),
        ],
        learning_rate,
        mixed_precision="bf16",
        compiled=compiled,
        identity=identity,
    )


def half_size(latents: torch.Tensor) -> torch.Tensor:
    """The low frequencies: `(B, C, H, W)` to `(B, C, H / 2, W / 2)`. The scale keeps unit-normal noise unit-normal, so
    that a timestep hides as much of the content as in full latents."""
    return 2 * F.avg_pool2d(latents, 2)
