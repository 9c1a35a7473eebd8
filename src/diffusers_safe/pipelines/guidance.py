"""Safe Latent Diffusion (SLD): the equations, and nothing else.

Schramowski et al., CVPR 2023, arXiv 2211.05105. SLD is classifier-free guidance in which the prediction for the prompt
is moved away from the prediction for a safety concept, where the two agree.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch

from ..arguments import typed
from ..values import choose


# The concept of the paper, with the words that diffusers puts before it.
SAFETY_CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily"
    " fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality,"
    " cruelty"
)


@typed
@dataclass(frozen=True)
class SafetyConfig(Mapping):
    """How strongly SLD steers. `WEAK`, `MEDIUM`, `STRONG` and `MAX` are the authors' four configs.

    A config can be passed on as keywords: `pipeline(prompt, **SafetyConfig.MAX)`.

    Attributes:
        sld_guidance_scale (`float`, defaults to 1000): s_S, how fast the effect of an element grows with the distance
            of the two predictions; at least 0. Up to 1, SLD is off.
        sld_warmup_steps (`int`, defaults to 10): delta, the first denoiser calls in which nothing is changed; at least
            0.
        sld_threshold (`float`, defaults to 0.01): lambda, elements whose prediction for the prompt exceeds that for
            the concept by this much are left alone.
        sld_momentum_scale (`float`, defaults to 0.3): s_m, in [0, 1].
        sld_mom_beta (`float`, defaults to 0.4): beta_m, in [0, 1): how much of the momentum a step keeps.

    Raises:
        `ValueError`: If a value is out of its range.
    """

    sld_guidance_scale: float = 1000
    sld_warmup_steps: int = 10
    sld_threshold: float = 0.01
    sld_momentum_scale: float = 0.3
    sld_mom_beta: float = 0.4

    WEAK: ClassVar["SafetyConfig"]
    MEDIUM: ClassVar["SafetyConfig"]
    STRONG: ClassVar["SafetyConfig"]
    MAX: ClassVar["SafetyConfig"]

    def __post_init__(self):
        for name, fits, allowed in (
            ("sld_guidance_scale", self.sld_guidance_scale >= 0, "at least 0, and finite"),
            ("sld_warmup_steps", self.sld_warmup_steps >= 0, "at least 0"),
            ("sld_momentum_scale", 0 <= self.sld_momentum_scale <= 1, "in [0, 1]"),
            ("sld_mom_beta", 0 <= self.sld_mom_beta < 1, "in [0, 1)"),
        ):
            if not fits:
                raise ValueError(f"{name} {getattr(self, name)}: must be {allowed}")

    @classmethod
    def named(cls, name: str) -> "SafetyConfig":
        """`"max"` -> `SafetyConfig.MAX`.

        Raises:
            `ValueError`: If there is no config of that name.
        """
        return SAFETY_CONFIGS[choose("safety config", name, SAFETY_CONFIGS)]

    @property
    def is_off(self) -> bool:
        """Whether these values change nothing."""
        return self.sld_guidance_scale <= 1

    def needs_concept(self, step: int) -> bool:
        """Whether denoiser call `step` (from 0) uses the prediction for the concept: before the end of the warm-up
        only the momentum does."""
        return step >= self.sld_warmup_steps or self.sld_momentum_scale > 0

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def __getitem__(self, name: str) -> float:
        if name not in list(self):
            raise KeyError(name)
        return getattr(self, name)


SafetyConfig.WEAK = SafetyConfig(200, 15, 0.0, 0.0, 0.0)  # s_S: the authors' model card; diffusers wrote 20
SafetyConfig.MEDIUM = SafetyConfig(1000, 10, 0.01, 0.3, 0.4)
SafetyConfig.STRONG = SafetyConfig(2000, 7, 0.025, 0.5, 0.7)
SafetyConfig.MAX = SafetyConfig(5000, 0, 1.0, 0.5, 0.7)
SAFETY_CONFIGS = {name: getattr(SafetyConfig, name.upper()) for name in ("weak", "medium", "strong", "max")}


class SafetyState(NamedTuple):
    """What one denoiser call hands to the next.

    Attributes:
        step (`int`): Denoiser calls so far. A scheduler that calls twice a step (Heun) counts twice.
        momentum (`torch.Tensor` or `None`): nu, `(B, C, H, W)`; `None` stands for zeros.
    """

    step: int = 0
    momentum: torch.Tensor | None = None


def guide_safely(
    noise_pred_uncond: torch.Tensor,
    noise_pred_text: torch.Tensor,
    noise_pred_safety: torch.Tensor,
    state: SafetyState,
    config: SafetyConfig,
) -> tuple[torch.Tensor, SafetyState]:
    """The prediction to put in place of `noise_pred_text` in classifier-free guidance.

    Equations are numbered as in the comments of diffusers' deprecated pipeline. Equation 3, `u + g * (c - u - gamma)`,
    is plain guidance with `c - gamma` for `c`.

    Args:
        noise_pred_uncond (`torch.Tensor`): u, `(B, C, H, W)`: for the negative prompt.
        noise_pred_text (`torch.Tensor`): c, the same shape: for the prompt.
        noise_pred_safety (`torch.Tensor`): f, the same shape: for the safety concept.
        state (`SafetyState`): From the call before; `SafetyState()` at the first.
        config (`SafetyConfig`): How strongly.

    Returns:
        `tuple[torch.Tensor, SafetyState]`: `c - gamma` (`c` itself during the warm-up), and the state for the next
        call.
    """
    distance = noise_pred_text - noise_pred_safety
    scale = (distance.abs() * config.sld_guidance_scale).clamp(max=1)  # eq. 6
    scale = scale.masked_fill(distance >= config.sld_threshold, 0)  # eq. 6
    guidance = (noise_pred_safety - noise_pred_uncond) * scale  # eq. 4
    if state.momentum is not None:
        guidance = guidance + config.sld_momentum_scale * state.momentum  # eq. 7
        momentum = config.sld_mom_beta * state.momentum + (1 - config.sld_mom_beta) * guidance  # eq. 8
    else:
        momentum = (1 - config.sld_mom_beta) * guidance
    changed = noise_pred_text if state.step < config.sld_warmup_steps else noise_pred_text - guidance  # eq. 3
    return changed, SafetyState(state.step + 1, momentum)
