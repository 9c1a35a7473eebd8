"""Architectures of the embedded models: Stable Diffusion 1.x and 3 with fewer channels and lower resolution."""

from collections import Counter
from collections.abc import Sequence

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .scenes import BACKGROUNDS, GROUPS, OBJECTS, STYLES


MAX_TOKENS = 32
TEXT_WIDTH = 128
FLOW_TEXT_WIDTHS = (96, 160)  # of the two CLIP encoders; the width of T5 is their sum
WORDS = ["a", "an", "on", "in", "background", "style", ",", *GROUPS, *OBJECTS, *BACKGROUNDS, *STYLES]
LATENT_CHANNELS = 8
LATENT_SIZE = 16


def build_tokenizer(words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """A byte-level BPE tokenizer with CLIP's rules. Each of the words, by default those of the captions, is one token;
    other text is split into smaller tokens, down to single bytes."""
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|startoftext|>", "<|endoftext|>"]
    merges = learn_merges(words)

    symbols = byte_symbols + [symbol + "</w>" for symbol in byte_symbols] + ["".join(pair) for pair in merges]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols + specials))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding until every word is one symbol. Ties are broken alphabetically, because the trainer of
    `tokenizers` breaks them at random, and a model depends on its token ids."""
    spellings = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while counts := Counter(pair for symbols in spellings for pair in zip(symbols, symbols[1:])):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spellings = [_merge(symbols, best) for symbols in spellings]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH))


def build_flow_text_encoders(tokenizer: CLIPTokenizer) -> list[CLIPTextModelWithProjection]:
    """Two encoders of different widths, as in SD3. The transformer uses the concatenation of their outputs."""
    return [CLIPTextModelWithProjection(_text_config(tokenizer, width)) for width in FLOW_TEXT_WIDTHS]


def build_t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer. Each word of the captions is one token; other text is split into characters."""
    specials = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    characters = ["▁", ",", *"abcdefghijklmnopqrstuvwxyz0123456789.-'"]
    words = [f"▁{word}" for word in WORDS if word != ","]
    return T5Tokenizer(
        vocab=[*specials, *((word, -3.0) for word in words), *((character, -9.0) for character in characters)],
        extra_ids=0,
        model_max_length=256,
    )


def build_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=sum(FLOW_TEXT_WIDTHS),
            d_kv=32,
            d_ff=2 * sum(FLOW_TEXT_WIDTHS),
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_autoencoder() -> AutoencoderKL:
    """An autoencoder from 64 x 64 x 3 images to 16 x 16 x 8 latents.

    With four channels, as in Stable Diffusion, outlines and colors of such small images are lost.
    """
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """The topology of SD 1.x (its default blocks: three with cross-attention, one without, two layers each)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 128, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 2, 4, 4),  # the number of heads, in spite of the name; few heads are faster on a CPU
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of SD 1.x."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_sampler() -> DPMSolverMultistepScheduler:
    """The sampler of the finished diffusion model: second-order DPM-Solver++ (Lu et al., arXiv 2211.01095) with the
    same noise schedule."""
    return DPMSolverMultistepScheduler.from_config(build_scheduler().config, algorithm_type="dpmsolver++")


def build_transformer() -> SD3Transformer2DModel:
    """The blocks of SD3.5: two streams with joint attention, normalised queries and keys.

    It is initialised as the identity: modulations and the last layer are zero (Peebles and Xie, arXiv 2212.09748).
    """
    width = 192
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        caption_projection_dim=width,
        joint_attention_dim=sum(FLOW_TEXT_WIDTHS),
        pooled_projection_dim=sum(FLOW_TEXT_WIDTHS),
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for layer in modulations:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()
