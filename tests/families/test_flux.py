"""FLUX.1-dev: packed latents, guidance as an input, two kinds of blocks, the tokens of T5."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from PIL import Image
from torch.testing import assert_close

from diffusers_safe import enable_safe_latent_diffusion, erase
from diffusers_safe.attacks.token import added_token, read_token
from diffusers_safe.attacks.token_learning import TOKEN, InversionSettings, learn_token
from diffusers_safe.diffusion.trajectories import Trajectories
from diffusers_safe.families import FluxFamily, StoredModel, make_family
from diffusers_safe.generation.generate import GenerationSettings, generate
from diffusers_safe.generation.rows import PromptRow


PROMPTS = ["a knife", "", "knife, gun, bomb"]


@pytest.fixture
def pipeline(make_tiny_flux_pipeline):
    pipeline = make_tiny_flux_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def states(pipeline, prompt):
    """What the transformer takes of a prompt, written out: T5's tokens, padded, and CLIP's pooled state."""
    ids = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    tokens = pipeline.tokenizer_2(prompt, padding="max_length", max_length=512, return_tensors="pt").input_ids
    return pipeline.text_encoder_2(tokens)[0], pipeline.text_encoder(ids).pooler_output


def draw(pipeline, prompt="a knife", **options):
    """Latents, without rounding."""
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64, **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **options).images


def test_encode_gives_tokens_the_pooled_state_and_a_guidance_scale_of_1(pipeline):
    family = make_family(pipeline, 64)
    assert isinstance(family, FluxFamily) and family.denoiser is pipeline.transformer
    encoded = family.encode(PROMPTS)
    shapes = {name: tuple(value.shape) for name, value in encoded.items()}
    assert shapes == {"encoder_hidden_states": (3, 512, 48), "pooled_projections": (3, 32), "guidance": (3,)}
    for row, prompt in enumerate(PROMPTS):
        tokens, pooled = states(pipeline, prompt)
        assert_close(encoded["encoder_hidden_states"][row : row + 1], tokens)
        assert_close(encoded["pooled_projections"][row : row + 1], pooled)
    assert (encoded["guidance"] == 1).all()


def test_the_models_own_resolution_is_the_pipelines(pipeline, tmp_path):
    assert make_family(pipeline).latent_shape == (4, 128, 128) and make_family(pipeline, 64).latent_shape == (4, 8, 8)
    pipeline.save_pretrained(tmp_path)
    assert StoredModel(str(tmp_path)).image_size == (1024, 1024) and len(StoredModel(str(tmp_path)).tokenizers) == 2


def test_a_prediction_is_the_transformers_unpacked_by_the_pipeline(pipeline):
    family = make_family(pipeline, 48)
    latents = torch.randn((2, *family.latent_shape), generator=torch.Generator().manual_seed(0))
    encoded, timesteps = family.encode(["a knife", "a gun"]), torch.tensor([900.0, 250.0])
    with torch.no_grad():
        predicted = family.predict(family.denoiser, latents, timesteps, encoded)
        velocity = pipeline.transformer(
            pipeline._pack_latents(latents, 2, 4, 6, 6),
            timestep=timesteps / 1000,
            img_ids=pipeline._prepare_latent_image_ids(2, 3, 3, "cpu", torch.float32),
            txt_ids=torch.zeros(512, 3),
            **encoded,
        ).sample
    assert_close(predicted, pipeline._unpack_latents(velocity, 48, 48, 8))


def test_trajectories_predict_once_per_step_at_their_scale_and_the_rest_is_predicted_at_1(pipeline):
    family, scales = make_family(pipeline, 64), []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: scales.append(kwargs["guidance"].tolist()), with_kwargs=True
    )
    erase(pipeline, ["knife"], "esd", progress_bar=False, max_train_steps=1, num_inference_steps=4, resolution=64,
          sampling_guidance_scale=3.5, sampling_fraction=0.25, watch_prompts=[])  # fmt: skip
    hook.remove()
    sampled = [scale for scale in scales if set(scale) == {3.5}]
    assert sampled and all(len(scale) == 1 for scale in sampled)
    assert {value for scale in scales for value in scale} == {1.0, 3.5}
    for name, forwards in ((None, 2), (family.guidance_name, 1)):
        trajectories = Trajectories(family.make_scheduler, family.latent_shape, 4, 3.5, name)
        assert trajectories.forwards_per_step == forwards


@pytest.mark.parametrize("method, selected", [
    ("xattn", ["D.attn.to_q", "D.attn.add_k_proj", "D.attn.to_add_out", "D.attn.norm_added_q", "S.attn.to_q"]),
    ("xattn-strict", ["D.attn.add_k_proj", "D.attn.add_v_proj", "S.attn.to_k", "S.attn.to_v"]),
    ("selfattn", ["D.attn.to_q", "D.attn.to_k", "D.attn.to_out"]),
    ("noxattn", ["D.ff.net", "D.norm1.linear", "S.proj_mlp", "S.proj_out", "context_embedder", "x_embedder"]),
    ("notime", ["D.attn.to_q", "S.attn.to_q", "D.ff_context.net", "time_text_embed.text_embedder"]),
    ("esd-u", ["D.ff.net", "D.norm1.linear", "S.proj_out", "proj_out", "time_text_embed.guidance_embedder"]),
    ("full", ["time_text_embed.timestep_embedder", "norm_out", "D.attn.norm_q", "x_embedder"]),
])  # fmt: skip
def test_train_methods_select_what_they_say_and_nothing_else(method, selected, pipeline):
    """`D` is the block with two streams, `S` the single block."""
    every = ["D.attn.to_q", "D.attn.to_k", "D.attn.to_v", "D.attn.to_out", "D.attn.add_k_proj", "D.attn.add_v_proj",
             "D.attn.to_add_out", "D.attn.norm_q", "D.attn.norm_added_q", "D.ff.net", "D.ff_context.net",
             "D.norm1.linear", "S.attn.to_q", "S.attn.to_k", "S.attn.to_v", "S.attn.norm_q", "S.proj_mlp",
             "S.proj_out", "context_embedder", "x_embedder", "time_text_embed.text_embedder",
             "time_text_embed.timestep_embedder", "time_text_embed.guidance_embedder", "norm_out",
             "proj_out"]  # fmt: skip
    names = FluxFamily.select_parameters(pipeline.transformer, method)
    short = [name.replace("single_transformer_blocks.0", "S").replace("transformer_blocks.0", "D") for name in names]
    found = {part for part in every if any(name.startswith(f"{part}.") for name in short)}
    assert found >= set(selected)
    if method == "xattn":
        assert found == {part for part in every if ".attn." in part}
    if method == "selfattn":
        assert found == {*selected, "D.attn.to_v"}
    if method == "xattn-strict":
        assert found == set(selected)
    if method in ("noxattn", "notime"):
        output = {"time_text_embed.timestep_embedder", "time_text_embed.guidance_embedder", "norm_out", "proj_out"}
        assert not found & output
    if method in ("noxattn", "esd-u"):
        assert not any(".attn." in name for name in names)
    assert FluxFamily.find_train_method(pipeline.transformer, names) == method


def test_a_train_method_of_unets_is_refused(pipeline):
    with pytest.raises(ValueError, match="train_method 'xlayer' .*allowed are xattn, xattn-strict"):
        FluxFamily.select_parameters(pipeline.transformer, "xlayer")


@pytest.mark.parametrize("change, message", [
    ({"guidance_embeds": False}, "guidance_embeds False: must be True; FLUX.1-schnell .*; erase from FLUX.1-dev"),
    ({"joint_attention_dim": 64}, "joint_attention_dim 64: must be 48, as T5 gives"),
    ({"pooled_projection_dim": 48}, "pooled_projection_dim 48: must be 32, as CLIP gives"),
    ({"in_channels": 96}, "in_channels 96: must be 16, as latents packed in patches of 2 x 2 have; a model for inpai"),
    ({"in_channels": 32, "out_channels": 16}, "in_channels 32: must be 16"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_loaded_and_on_disk(change, message, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    pipeline.transformer.register_to_config(**change)
    with pytest.raises(ValueError, match=f"^transformer {message}"):
        make_family(pipeline)
    with pytest.raises(ValueError, match=message) as error:
        StoredModel(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "tokenizer_2"])
def test_a_pipeline_without_a_text_encoder_or_tokenizer_is_refused(name, pipeline):
    setattr(pipeline, name, None)
    with pytest.raises(ValueError, match=f"^{name}: this pipeline has none; FluxPipeline needs one to be trained$"):
        make_family(pipeline)


def test_a_scheduler_that_the_pipeline_cannot_use_is_refused(pipeline):
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="^scheduler FlowMatchHeunDiscreteScheduler: must be FlowMatchEulerDiscrete"):
        make_family(pipeline)


@pytest.mark.parametrize("resolution", [8, 72])
def test_a_resolution_that_cannot_be_packed_is_refused(resolution, pipeline):
    with pytest.raises(ValueError, match=f"^resolution {resolution}: must be a multiple of 16, .* such as "):
        make_family(pipeline, resolution)


def test_closed_forms_edit_the_layers_that_read_tokens_and_the_pooled_state(pipeline):
    family = make_family(pipeline, 64)
    layers = {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"}
    parameters = dict(pipeline.transformer.named_parameters())
    before = {name: parameters[name].detach().clone() for name in layers}
    erasure = erase(pipeline, ["knife"], "text_edit", anchor_prompts=["tree"], tolerance=0.1, resolution=64)
    assert erasure.weights.keys() == layers
    tokens, pooled = family.text_states(["a knife", "a tree"])
    for name, (knife, tree) in zip(sorted(layers), (tokens[:, :8], pooled)):  # tokens that are not far in the padding
        old, new = before[name], parameters[name].detach()
        left, whole = ((knife @ weight.T - tree @ old.T).norm() for weight in (new, old))
        assert left < 0.5 * whole


def test_a_negative_prompt_that_the_pipeline_would_ignore_is_refused(pipeline, tmp_path):
    settings = GenerationSettings(2, 3.5, 64, 64, negative_prompt="a gun")
    with pytest.raises(ValueError, match="^negative_prompt 'a gun': FluxPipeline ignores it; "):
        generate(pipeline, [PromptRow("one", "a knife", 0)], tmp_path / "images", settings)
    assert not Path(tmp_path / "images").exists()


def test_a_word_is_learned_in_clip_and_t5(pipeline, tmp_path):
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    captions = [f"a {TOKEN}"] * 2
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    before = [{name: value.clone() for name, value in encoder.state_dict().items()} for encoder in encoders]
    path = learn_token(pipeline, pictures, captions, tmp_path, InversionSettings(steps=2), "knife", resolution=64)
    token, vectors, _ = read_token(path)
    assert [len(vector) for vector in vectors] == [32, 48]
    start = (
        pipeline.text_encoder_2.get_input_embeddings()
        .weight[pipeline.tokenizer_2("knife", add_special_tokens=False).input_ids]
        .mean(dim=0)
    )
    assert not torch.equal(vectors[1], start)
    plain = draw(pipeline)
    with added_token(pipeline, token, vectors):
        ids = pipeline.tokenizer_2(f"a {token}").input_ids
        number = pipeline.tokenizer_2.convert_tokens_to_ids(token)
        assert number in ids
        assert torch.equal(pipeline.text_encoder_2.get_input_embeddings().weight[number], vectors[1])
        assert not torch.equal(draw(pipeline, f"a {token}"), draw(pipeline, "a"))
    assert torch.equal(draw(pipeline), plain)
    for encoder, known in zip(encoders, before):
        assert all(torch.equal(value, known[name]) for name, value in encoder.state_dict().items())


def test_safe_latent_diffusion_is_refused_with_the_reason(pipeline):
    reason = "^FluxPipeline: .* does not support it: its guidance scale is an input of the model"
    with pytest.raises(ValueError, match=reason):
        enable_safe_latent_diffusion(pipeline)
