"""Training of the UNet of the diffusion model and its text encoder."""

import numpy as np
import torch
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
    rounds: list[int],
    learning_rate: float,
    identity: dict,
    compiled: bool = False,
) -> Stage:
    """The stage that trains the UNet. Half of the timesteps are above 750, where the caption matters, and batches are
    small; in the last round timesteps are uniform and batches larger, to learn details."""

    def round_of(steps: int, batch_size: int, power: int) -> Round:
        def make_batch(rng: np.random.Generator, size: int) -> Batch:
            batch = data.sample(rng, size)
            del batch["captions"]
            timesteps = 999.99 * (1 - stratified(rng, size) ** power)
            return {**batch, "timesteps": torch.from_numpy(timesteps.astype(np.int64))}

        return Round(steps, batch_size, make_batch)

    return Stage(
        "unet",
        UNetLoss(build_text_encoder(build_tokenizer()), build_unet()),
        [*(round_of(steps, 16, power=2) for steps in rounds[:-1]), round_of(rounds[-1], 32, power=1)],
        learning_rate,
        mixed_precision="bf16",
        compiled=compiled,
        identity=identity,
    )
