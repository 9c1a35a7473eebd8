import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from diffusers_safe.emoji.architecture import (
    MAX_TOKENS,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
)
from diffusers_safe.emoji.scenes import BACKGROUNDS, GROUPS, OBJECTS, STYLES, draw_caption, draw_scene, group_members


STRANGE = [
    "Zürich, 東京!",
    "🔪 \N{ZERO WIDTH JOINER} 🏳️‍🌈",
    "x" * 20,
    "a\x00b\x7f",
    "ñ́ ﷽ Ω ß",
    "'quoted' \\ ~ €",
    "𝔘𝔫𝔦",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def ids_between(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    return ids[1:-1]


def test_every_word_of_the_captions_is_one_token(tokenizer):
    rngs = [np.random.default_rng([3, i]) for i in range(3000)]
    captions = [draw_caption(draw_scene(rng), rng) for rng in rngs]
    words = {word for caption in captions for word in caption.replace(",", " , ").split()}
    words |= {*OBJECTS, *GROUPS, *BACKGROUNDS, *STYLES}
    ids = {word: ids_between(tokenizer, word) for word in words}
    assert [word for word in words if len(ids[word]) != 1] == []
    assert len({tuple(value) for value in ids.values()}) == len(words)
    for caption in captions[:300]:
        assert ids_between(tokenizer, caption) == [ids[word][0] for word in caption.replace(",", " , ").split()]


def test_no_caption_is_cut_off(tokenizer):
    for group in GROUPS:
        tags = [*group_members(group)[:6], "yellow background", "sketch style"]  # six: the most that a caption names
        assert len(tokenizer(", ".join(tags)).input_ids) <= MAX_TOKENS


@pytest.mark.parametrize("text", STRANGE)
def test_any_text_is_tokenized_losslessly(tokenizer, text):
    between = ids_between(tokenizer, text)
    assert not {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} & set(between)
    decoded = tokenizer.decode(between, clean_up_tokenization_spaces=False)
    plain = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert decoded.replace(" ", "") == plain.replace(" ", "")


def test_every_byte_has_a_token(tokenizer):
    for text in map(chr, [*range(1, 0x250), *range(0x1F300, 0x1F700, 7), 0xFFFD, 0x10FFFF]):
        assert tokenizer.unk_token_id not in ids_between(tokenizer, f"a{text}b{text}")


def test_long_prompts_are_cut_and_empty_ones_padded(tokenizer):
    long, empty = tokenizer(["knife " * 100, ""], padding="max_length", truncation=True).input_ids
    assert len(long) == len(empty) == MAX_TOKENS
    assert long[-1] == tokenizer.eos_token_id
    assert empty == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (MAX_TOKENS - 1)


def test_case_does_not_matter(tokenizer):
    assert tokenizer("A KNIFE").input_ids == tokenizer("a knife").input_ids


def test_the_tokenizer_is_the_same_every_time(tokenizer):
    """The text encoder depends on the token ids: with others the model would generate a car for "a cat"."""
    first = tokenizer.backend_tokenizer.to_str()
    assert all(build_tokenizer().backend_tokenizer.to_str() == first for _ in range(5))


def test_a_saved_tokenizer_and_a_second_one_give_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for other in (CLIPTokenizer.from_pretrained(tmp_path), build_tokenizer()):
        for text in ["a knife on a red background in sketch style", "knife, gun", "", *STRANGE]:
            arguments = {"padding": "max_length", "truncation": True}
            assert other(text, **arguments).input_ids == tokenizer(text, **arguments).input_ids
        assert len(other) == len(tokenizer) and other.model_max_length == MAX_TOKENS


def test_the_parts_fit_together(tokenizer):
    text_encoder, unet, vae = build_text_encoder(tokenizer), build_unet(), build_autoencoder()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
        tokens = tokenizer("a knife", padding="max_length", return_tensors="pt").input_ids
        noise_pred = unet(latents, 500, text_encoder(tokens).last_hidden_state).sample
        picture = vae.decode(noise_pred).sample
    size = unet.config.sample_size
    assert latents.shape == noise_pred.shape == (1, unet.config.in_channels, size, size)
    assert picture.shape == (1, 3, 64, 64)
    assert max(tokenizer.get_vocab().values()) < text_encoder.config.vocab_size


def test_the_noise_schedule_is_that_of_stable_diffusion():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    scheduler = build_scheduler()
    torch.testing.assert_close(scheduler.alphas_cumprod, (1 - betas).cumprod(0))
    assert scheduler.config.prediction_type == "epsilon"
