"""The shape of the embedded model: Stable Diffusion 1.x, scaled down in width and resolution."""

from collections import Counter

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import BACKGROUNDS, GROUPS, OBJECTS, STYLES


MAX_TOKENS = 32
TEXT_WIDTH = 128


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE with CLIP's rules in which every word of the captions is one token and any other text is
    spelled out, byte by byte if need be."""
    words = ["a", "an", "on", "in", "background", "style", ",", *GROUPS, *OBJECTS, *BACKGROUNDS, *STYLES]
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|startoftext|>", "<|endoftext|>"]
    merges = learn_merges(words)

    symbols = byte_symbols + [symbol + "</w>" for symbol in byte_symbols] + ["".join(pair) for pair in merges]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols + specials))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding, until every word is one symbol. Ties go by the alphabet: `tokenizers`' own trainer breaks
    them at random, and other token numbers are another model."""
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
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_autoencoder() -> AutoencoderKL:
    """64 x 64 x 3 pictures to 16 x 16 x 4 latents.

    Stable Diffusion's compression, 8 x 8 x 4 here, was tried: 64 pixels hold too little redundancy for it, and the
    restored emoji were a blur.
    """
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )


def build_unet() -> UNet2DConditionModel:
    """The topology of SD 1.x (its default blocks: three with cross-attention, one without, two layers each).

    Heads of 32 channels at every level, as in SD 2.x: the many thin heads of SD 1.x are slow on a CPU.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 2, 4, 4),  # diffusers' name for the number of heads
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
