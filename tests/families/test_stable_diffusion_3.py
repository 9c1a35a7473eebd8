"""Stable Diffusion 3: three encoders, pooled states, joint attention."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffusers_safe import erase
from diffusers_safe.attacks.token import added_token, read_token
from diffusers_safe.attacks.token_learning import TOKEN, InversionSettings, learn_token
from diffusers_safe.families import StableDiffusion3Family, StoredModel, make_family


PROMPTS = ["a knife", "", "knife, gun, bomb"]


@pytest.fixture
def pipeline(make_tiny_sd3_pipeline):
    return make_tiny_sd3_pipeline()


def states(pipeline, prompt):
    """What the transformer takes of a prompt, written out: CLIP's tokens side by side and padded, T5's, and CLIP's
    pooled states."""
    hidden, pooled = [], []
    for number in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{number}")
        tokens = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        output = getattr(pipeline, f"text_encoder{number}")(tokens, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    clip = torch.cat([*hidden, torch.zeros(1, 32, 96 - 80)], dim=-1)
    tokens = pipeline.tokenizer_3(prompt, padding="max_length", max_length=256, return_tensors="pt").input_ids
    return torch.cat([clip, pipeline.text_encoder_3(tokens)[0]], dim=1), torch.cat(pooled, dim=-1)


def draw(pipeline, prompt="a knife"):
    """Latents, without rounding."""
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipeline(prompt, **options).images


def test_encode_gives_all_encoders_and_the_pooled_states_of_the_empty_prompt_too(pipeline):
    family = make_family(pipeline)
    assert isinstance(family, StableDiffusion3Family) and family.denoiser is pipeline.transformer
    encoded = family.encode(PROMPTS)
    shapes = {name: tuple(value.shape) for name, value in encoded.items()}
    assert shapes == {"encoder_hidden_states": (3, 32 + 256, 96), "pooled_projections": (3, 32)}
    for row, prompt in enumerate(PROMPTS):
        tokens, pooled = states(pipeline, prompt)
        assert_close(encoded["encoder_hidden_states"][row : row + 1], tokens)
        assert_close(encoded["pooled_projections"][row : row + 1], pooled)


def test_without_t5_its_tokens_are_zeros_and_its_tokenizer_is_not_needed(make_tiny_sd3_pipeline, tmp_path):
    pipeline = make_tiny_sd3_pipeline(t5=False)
    family = make_family(pipeline)
    assert not family.encode(["a knife"])["encoder_hidden_states"][:, 32:].any()
    assert list(family.sequences) == ["tokenizer"]
    pipeline.save_pretrained(tmp_path)
    assert len(StoredModel(str(tmp_path)).tokenizers) == 2
    pipeline.tokenizer_2 = None
    with pytest.raises(ValueError, match="tokenizer_2: this pipeline has none"):
        make_family(pipeline)


@pytest.mark.parametrize("method, selected", [
    ("xattn", ["attn.to_q", "attn.add_k_proj", "attn.to_add_out", "attn.norm_added_q"]),
    ("xattn-strict", ["attn.add_k_proj", "attn.add_v_proj"]),
    ("selfattn", ["attn.to_q", "attn.to_out", "attn2.to_k"]),
    ("noxattn", ["attn2.to_k", "ff.net", "context_embedder", "norm1.linear"]),
    ("notime", ["attn.to_q", "ff_context.net", "time_text_embed.text_embedder"]),
    ("esd-u", ["ff.net", "norm1.linear", "proj_out", "attn2.to_k"]),
    ("full", ["time_text_embed.timestep_embedder", "pos_embed.proj", "norm_out", "attn.norm_q"]),
])  # fmt: skip
def test_train_methods_select_what_they_say_and_nothing_else(method, selected, pipeline):
    every = ["attn.to_q", "attn.to_out", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "attn.norm_q",
             "attn.norm_added_q", "attn2.to_k", "ff.net", "ff_context.net", "norm1.linear", "context_embedder",
             "time_text_embed.text_embedder", "time_text_embed.timestep_embedder", "pos_embed.proj", "norm_out",
             "proj_out"]  # fmt: skip
    names = StableDiffusion3Family.select_parameters(pipeline.transformer, method)
    found = {part for part in every if any(f".{part}." in f".{name}" for name in names)}
    assert found >= set(selected)
    if method in ("xattn-strict", "selfattn", "xattn"):
        assert all(".attn" in name for name in names)
    if method in ("xattn-strict", "selfattn"):
        assert found == set(selected)
    if method in ("noxattn", "notime"):
        assert not found & {"time_text_embed.timestep_embedder", "norm_out", "proj_out"}
    assert StableDiffusion3Family.find_train_method(pipeline.transformer, names) == method


@pytest.mark.parametrize("component, change, message", [
    ("transformer", {"joint_attention_dim": 64}, "joint_attention_dim 64: must be 96, as T5 gives"),
    ("transformer", {"pooled_projection_dim": 48}, "pooled_projection_dim 48: must be 32"),
    ("transformer", {"in_channels": 9}, "in_channels 9: must be 4, as latents have; a model for inpainting"),
    ("scheduler", {"use_dynamic_shifting": True}, "patch_size 1: must be 2 with dynamic shifting"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(component, change, message, pipeline):
    getattr(pipeline, component).register_to_config(**change)
    if component == "scheduler":
        pipeline.transformer.register_to_config(patch_size=1)
    with pytest.raises(ValueError, match=message):
        make_family(pipeline)


@pytest.mark.parametrize("resolution", [8, 72, 144])
def test_a_resolution_that_patches_or_positions_do_not_allow_is_refused(resolution, pipeline):
    with pytest.raises(ValueError, match=f"resolution {resolution}: must be a multiple of 16 up to 128"):
        make_family(pipeline, resolution)
    assert make_family(pipeline, 128).latent_shape == (4, 16, 16)


def test_closed_forms_edit_the_layers_that_read_text_in_all_their_tokens(pipeline):
    family = make_family(pipeline)
    weight = pipeline.transformer.context_embedder.weight.detach().clone()
    pooled_weight = pipeline.transformer.time_text_embed.text_embedder.linear_1.weight.detach().clone()
    erasure = erase(pipeline, ["knife"], "text_edit", anchor_prompts=["tree"], tolerance=0.1)
    layers = {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"}
    assert erasure.weights.keys() == layers
    tokens, pooled = family.text_states(["a knife", "a tree"])
    edited = pipeline.transformer.context_embedder.weight.detach()
    for place in (slice(0, 32), slice(32, 40)):  # CLIP's tokens, and those of T5 that are not far in the padding
        knife, tree = tokens[:, place]
        before, after = ((knife @ w.T - tree @ weight.T).norm() for w in (weight, edited))
        assert after < 0.5 * before
    edited = pipeline.transformer.time_text_embed.text_embedder.linear_1.weight.detach()
    before, after = ((pooled[0] @ w.T - pooled[1] @ pooled_weight.T).norm() for w in (pooled_weight, edited))
    assert after < 0.5 * before


def test_a_word_is_learned_in_both_clip_encoders(pipeline, tmp_path):
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    captions = [f"a {TOKEN}"] * 2
    before = {name: value.clone() for name, value in pipeline.text_encoder_2.state_dict().items()}
    path = learn_token(pipeline, pictures, captions, tmp_path, InversionSettings(steps=2), "knife")
    token, vectors, _ = read_token(path)
    assert [len(vector) for vector in vectors] == [32, 48]
    plain = draw(pipeline)
    with added_token(pipeline, token, vectors):
        ids = pipeline.tokenizer_2(f"a {token}").input_ids
        assert len(ids) == 4 and torch.equal(pipeline.text_encoder_2.get_input_embeddings().weight[ids[2]], vectors[1])
        assert not torch.equal(draw(pipeline, f"a {token}"), draw(pipeline, "a"))
    assert torch.equal(draw(pipeline), plain)
    assert all(torch.equal(value, before[name]) for name, value in pipeline.text_encoder_2.state_dict().items())
