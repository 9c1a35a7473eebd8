"""Training of the flow-matching transformer and its three text encoders."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..architecture import (
    build_flow_text_encoders,
    build_t5_encoder,
    build_t5_tokenizer,
    build_tokenizer,
    build_transformer,
)
from ..scenes import VARIED, Variation
from .pictures import MORE_SKETCHES, CaptionedLatents, Lesson, stratified
from .stage import Batch, Round, Stage


SHORT_LENGTH = 24  # tokens of T5, enough for every caption
STOCK_LENGTH = 256  # the pipeline's default `max_sequence_length`
T5_DROPOUT = 0.3  # share of samples without T5


class TransformerLoss(nn.Module):
    """Rectified flow (Esser et al., arXiv 2403.03206): the transformer predicts noise - latents at
    (1 - sigma) latents + sigma noise. Its text encoders are trained with it.

    If T5 is dropped, its states are zeros, as in a pipeline without this encoder.
    """

    def __init__(self, clip_encoders: list[nn.Module], t5_encoder: nn.Module, transformer: nn.Module):
        super().__init__()
        self.clip_encoders, self.t5_encoder = nn.ModuleList(clip_encoders), t5_encoder
        self.transformer = transformer

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        input_ids: torch.Tensor,
        t5_input_ids: torch.Tensor,
        t5_kept: torch.Tensor,
    ) -> torch.Tensor:
        sigma = sigmas.view(-1, 1, 1, 1)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward is slow in bfloat16 on a CPU
            clip = [encoder(input_ids, output_hidden_states=True) for encoder in self.clip_encoders]
            t5_states = self.t5_encoder(t5_input_ids)[0] * t5_kept.view(-1, 1, 1)
            clip_states = torch.cat([states.hidden_states[-2] for states in clip], dim=-1)
            velocity = self.transformer(
                (1 - sigma) * latents + sigma * noise,
                encoder_hidden_states=torch.cat([clip_states, t5_states], dim=1),
                pooled_projections=torch.cat([states.text_embeds for states in clip], dim=-1),
                timestep=1000 * sigmas,
                return_dict=False,
            )[0]
        return (velocity.float() - (noise - latents)).square().mean()


TRANSFORMER_LESSONS = (
    *(Lesson(steps, VARIED) for steps in (446, 3045, 928)),
    Lesson(2400, MORE_SKETCHES, details=True, decays=True),
)


def transformer_stage(
    lessons: Sequence[Lesson],
    data: Callable[[Variation], CaptionedLatents],
    learning_rate: float,
    identity: dict,
) -> Stage:
    """The stage that trains the transformer in these rounds; `data` gives the samples with a variation.

    High noise levels are logit-normal around sigma 0.73, higher than in SD3. One step in thirty pads the tokens of T5
    as the stock pipeline does. The others pad them to `SHORT_LENGTH`, which leaves a third of all tokens.
    """
    t5_tokenizer = build_t5_tokenizer()

    def round_of(lesson: Lesson) -> Round:
        def make_batch(rng: np.random.Generator, size: int) -> Batch:
            batch = data(lesson.variation).sample(rng, size)
            uniform = torch.from_numpy(stratified(rng, size))
            length = STOCK_LENGTH if rng.random() < 1 / 30 else SHORT_LENGTH
            t5_tokens = t5_tokenizer(
                batch.pop("captions"), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            sigmas = uniform if lesson.details else (1.0 + 1.2 * torch.special.ndtri(uniform)).sigmoid()
            return {
                **batch,
                "sigmas": sigmas.float(),
                "t5_input_ids": t5_tokens.input_ids,
                "t5_kept": torch.from_numpy(rng.random(size) >= T5_DROPOUT).float(),
            }

        return Round(lesson.steps, lesson.batch_size, make_batch, lesson.decays)

    return Stage(
        "transformer",
        TransformerLoss(
            build_flow_text_encoders(build_tokenizer()), build_t5_encoder(t5_tokenizer), build_transformer()
        ),
        [round_of(lesson) for lesson in lessons],
        learning_rate,
        mixed_precision="bf16",
        identity=identity,
    )
