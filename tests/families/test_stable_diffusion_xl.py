"""SDXL: two encoders, pooled states, time ids, and what it takes as unconditional."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffusers_safe.diffusion.trajectories import concatenate, repeat, select
from diffusers_safe.families import StableDiffusionXLFamily, make_family


PROMPTS = ["a knife", "", "knife, gun, bomb"]


@pytest.fixture
def pipeline(make_tiny_xl_pipeline):
    return make_tiny_xl_pipeline()


def states(pipeline, prompt):
    """Hidden states before the last layer of both encoders, and the pooled ones of the second, written out."""
    hidden = []
    for number in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{number}")
        tokens = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            output = getattr(pipeline, f"text_encoder{number}")(tokens, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return torch.cat(hidden, dim=-1), output.text_embeds


def test_encode_gives_both_encoders_the_pooled_state_and_the_time_ids(pipeline):
    family = make_family(pipeline)
    assert isinstance(family, StableDiffusionXLFamily) and family.denoiser is pipeline.unet
    encoded = family.encode(PROMPTS)
    shapes = {name: tuple(value.shape) for name, value in encoded.items()}
    assert shapes == {"encoder_hidden_states": (3, 32, 80), "text_embeds": (3, 24), "time_ids": (3, 6)}
    assert not any(value.requires_grad for value in encoded.values())
    for row in (0, 2):
        hidden, pooled = states(pipeline, PROMPTS[row])
        torch.testing.assert_close(encoded["encoder_hidden_states"][row : row + 1], hidden)
        torch.testing.assert_close(encoded["text_embeds"][row : row + 1], pooled)
    assert encoded["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 3


def test_the_empty_prompt_is_zeros_where_the_model_learned_zeros(pipeline):
    assert pipeline.config.force_zeros_for_empty_prompt
    encoded = select(make_family(pipeline).encode(PROMPTS), [1])
    assert not encoded["encoder_hidden_states"].any() and not encoded["text_embeds"].any()


def test_the_empty_prompt_is_encoded_where_the_model_learned_that(pipeline):
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    encoded = select(make_family(pipeline).encode(PROMPTS), [1])
    hidden, pooled = states(pipeline, "")
    torch.testing.assert_close(encoded["encoder_hidden_states"], hidden)
    torch.testing.assert_close(encoded["text_embeds"], pooled)


def test_the_time_ids_follow_the_resolution(pipeline):
    family = make_family(pipeline, resolution=96)
    assert family.latent_shape == (4, 12, 12)
    assert family.encode(["a knife"])["time_ids"].tolist() == [[96, 96, 0, 0, 96, 96]]


def test_predict_gives_the_unet_all_of_it(pipeline):
    family = make_family(pipeline)
    encoded = family.encode(["a knife", "a cat", ""])
    both = concatenate(repeat(select(encoded, [2]), 2), select(encoded, [0, 1]))
    model_input = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([981, 21, 981, 21])
    with torch.no_grad():
        noise_pred = family.predict(family.denoiser, model_input, timesteps, both)
        for row, prompt in ((2, "a knife"), (3, "a cat")):
            hidden, pooled = states(pipeline, prompt)
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
            expected = pipeline.unet(
                model_input[row : row + 1], timesteps[row], hidden, added_cond_kwargs=added
            ).sample
            torch.testing.assert_close(noise_pred[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
def test_a_prompt_too_long_for_either_tokenizer_is_refused(pipeline, tokenizer):
    getattr(pipeline, tokenizer).model_max_length = 5
    with pytest.raises(ValueError, match="prompt 'knife, gun, bomb.*has 7 tokens; this model takes 5"):
        make_family(pipeline).encode(PROMPTS)


def test_a_refiner_is_refused(pipeline):
    parts = {**pipeline.components, "text_encoder": None, "tokenizer": None}
    with pytest.raises(ValueError, match="text_encoder: this pipeline has none.*refiner"):
        make_family(StableDiffusionXLPipeline(**parts, add_watermarker=False))
    pipeline.unet.register_to_config(projection_class_embeddings_input_dim=5 * 8 + 24)
    with pytest.raises(ValueError, match="projection_class_embeddings_input_dim 64: must be 72.*aesthetics"):
        make_family(pipeline)
