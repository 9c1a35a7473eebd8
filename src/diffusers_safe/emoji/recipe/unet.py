"""Training of the UNet of the diffusion model and its text encoder."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..architecture import build_scheduler, build_text_encoder, build_tokenizer, build_unet
from ..scenes import UPRIGHT, VARIED, Variation
from .pictures import MIRRORED, MORE_SKETCHES, NEARLY_UPRIGHT, CaptionedLatents, Lesson, stratified
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


UNET_LESSONS = (
    *(Lesson(steps, VARIED, batch_size=64, coarse=True) for steps in (1884, 957, 2000)),
    *(Lesson(steps, VARIED) for steps in (2254, 2500)),
    *(Lesson(steps, NEARLY_UPRIGHT, details=True) for steps in (978, 2661)),
    Lesson(2220, MIRRORED, details=True),
    Lesson(2500, UPRIGHT, details=True, decays=True),
    Lesson(1700, MORE_SKETCHES, details=True, decays=True),
)


def unet_stage(
    lessons: Sequence[Lesson],
    data: Callable[[Variation], CaptionedLatents],
    learning_rate: float,
    identity: dict,
    compiled: bool = False,
) -> Stage:
    """The stage that trains the UNet in these rounds; `data` gives the samples with a variation."""

    def round_of(lesson: Lesson) -> Round:
        def make_batch(rng: np.random.Generator, size: int) -> Batch:
            batch = data(lesson.variation).sample(rng, size)
            del batch["captions"]
            # Half of the timesteps are above 750, where the caption matters.
            timesteps = 999.99 * (1 - stratified(rng, size) ** (1 if lesson.details else 2))
            if lesson.coarse:
                batch |= {name: half_size(batch[name]) for name in ("latents", "noise")}
            return {**batch, "timesteps": torch.from_numpy(timesteps.astype(np.int64))}

        return Round(lesson.steps, lesson.batch_size, make_batch, lesson.decays)

    return Stage(
        "unet",
        UNetLoss(build_text_encoder(build_tokenizer()), build_unet()),
        [round_of(lesson) for lesson in lessons],
        learning_rate,
        mixed_precision="bf16",
        compiled=compiled,
        identity=identity,
    )


def half_size(latents: torch.Tensor) -> torch.Tensor:
    """The low frequencies: `(B, C, H, W)` to `(B, C, H / 2, W / 2)`. The scale keeps unit-normal noise unit-normal, so
    that a timestep hides as much of the content as in full latents."""
    return 2 * F.avg_pool2d(latents, 2)
