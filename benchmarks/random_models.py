"""Stable Diffusion with random weights, for measurements that depend on its size only. Nothing is downloaded."""

import multiprocessing
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_safe.emoji.architecture import WORDS, build_scheduler, build_tokenizer


UNETS = {
    # The defaults of diffusers are those of SD 1.x: 859,520,964 parameters.
    "sd-1": {"cross_attention_dim": 768},
    "tiny": {
        "cross_attention_dim": 32,
        "block_out_channels": (8, 16, 16, 16),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
}
TOKENS = 77


def random_pipeline(
    size: str, latent_size: int = 64, text_layers: int = 1, words: Sequence[str] = WORDS
) -> StableDiffusionPipeline:
    """A pipeline with the UNet of SD 1.x (`"sd-1"`) or a tiny UNet of the same structure (`"tiny"`).

    The text encoder has a single layer unless more are asked for (CLIP-L has 12), and the autoencoder is tiny, because
    erasure encodes prompts once and decodes nothing. `words` are those that the tokenizer knows.
    """
    unet = UNet2DConditionModel(sample_size=latent_size, **UNETS[size])
    tokenizer = build_tokenizer(words)
    tokenizer.model_max_length = TOKENS
    width = unet.config.cross_attention_dim
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width if text_layers > 1 else width,
            num_hidden_layers=text_layers,
            num_attention_heads=max(2, width // 64),
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def in_own_process(function: Callable, *args) -> Any:
    """Calls `function(*args)` in a new process, to measure peak memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def peak_bytes(device: torch.device) -> int:
    """The peak memory of this process: allocations on a GPU, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
