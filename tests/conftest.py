"""Models small enough to build in a blink, of the real classes."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_safe.emoji.architecture import MAX_TOKENS, build_scheduler, build_tokenizer


def build_tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights, 0.5 M parameters, latents 4 x 8 x 8, pictures of 64 x 64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=2,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def make_tiny_pipeline():
    """The function `(seed=0) -> StableDiffusionPipeline`: new each call, the same weights for a seed."""
    return build_tiny_pipeline


@pytest.fixture
def tiny_pipeline() -> StableDiffusionPipeline:
    """A new tiny pipeline that a test may change."""
    return build_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> str:
    """A tiny pipeline saved to disk, for code that loads models by path. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny_model")
    build_tiny_pipeline().save_pretrained(folder)
    return str(folder)
