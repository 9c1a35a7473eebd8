"""SD 1.x (epsilon) and SD 2.x (v prediction, linear projections, heads by level) through the one interface."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_safe.diffusion.trajectories import Trajectories
from diffusers_safe.families import StableDiffusionFamily, StoredModel, make_family
from diffusers_safe.methods import TrainingBatch
from diffusers_safe.methods.predictor import Predictor
from diffusers_safe.methods.sdd import SDDObjective
from diffusers_safe.weights.trained import TrainedWeights, select_parameters


@pytest.fixture(params=["sd-1", "sd-2"])
def pipeline(request, make_tiny_pipeline, make_tiny_sd_2_pipeline):
    return make_tiny_pipeline() if request.param == "sd-1" else make_tiny_sd_2_pipeline()


@pytest.fixture
def batch():
    return torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([981, 21])


def text_states(pipeline, prompts):
    """What the text encoder says, without `encode_prompt`."""
    tokens = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder(tokens).last_hidden_state


def test_encode_is_the_pipelines_own(pipeline):
    prompts = ["a knife", "", "knife, gun, bomb"]
    encoded = make_family(pipeline).encode(prompts)
    assert set(encoded) == {"encoder_hidden_states"}
    states = encoded["encoder_hidden_states"]
    assert states.shape[:2] == (3, 32) and not states.requires_grad
    for row, prompt in enumerate(prompts):
        expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        torch.testing.assert_close(states[row : row + 1], expected)
    torch.testing.assert_close(states, text_states(pipeline, prompts))


def test_a_prompt_that_would_be_cut_off_is_refused(pipeline):
    with pytest.raises(ValueError, match="122 tokens; this model takes 32"):
        make_family(pipeline).encode(["a knife", "knife, gun, " * 30])


def test_a_learned_word_counts_as_the_tokens_it_stands_for(pipeline):
    """Textual inversion: the pipeline puts several tokens in the place of one word."""
    pipeline.tokenizer.add_tokens(["<w>", "<w>_1", "<w>_2", "<w>_3"])
    with pytest.raises(ValueError, match="42 tokens; this model takes 32"):
        make_family(pipeline).encode(["<w> " * 10])


def test_the_empty_prompt_is_the_pipelines_unconditional_one(pipeline):
    _, unconditional = pipeline.encode_prompt("a knife", "cpu", 1, True)
    encoded = make_family(pipeline).encode([""])["encoder_hidden_states"]
    torch.testing.assert_close(encoded, unconditional)


def test_predict_is_the_unet_in_its_own_parametrisation(pipeline, batch):
    family = make_family(pipeline)
    prompts = ["a knife", ""]
    with torch.no_grad():
        noise_pred = family.predict(family.denoiser, *batch, family.encode(prompts))
        expected = pipeline.unet(*batch, text_states(pipeline, prompts)).sample
    assert family.denoiser is pipeline.unet
    torch.testing.assert_close(noise_pred, expected)


def test_latent_shape(pipeline):
    assert make_family(pipeline).latent_shape == (4, 8, 8)
    pipeline.unet.register_to_config(sample_size=(8, 16))
    assert make_family(pipeline).latent_shape == (4, 8, 16)


def test_schedulers_are_fresh_copies_of_the_pipelines(pipeline):
    family = make_family(pipeline)
    first, second = family.make_scheduler(), family.make_scheduler()
    first.set_timesteps(7)
    assert second.num_inference_steps is None and pipeline.scheduler.num_inference_steps is None
    assert dict(first.config) == dict(pipeline.scheduler.config)


def test_the_last_latent_of_a_trajectory_is_that_of_the_pipeline(pipeline):
    """With the trajectory's last step done here, the pipeline's own latents come out."""
    family = make_family(pipeline)
    steps, guidance_scale = 4, 3.0
    noise = torch.randn((1, *family.latent_shape), generator=torch.Generator().manual_seed(5))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a knife", latents=noise, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="latent"
    ).images

    def predict(*inputs):
        return family.predict(family.denoiser, *inputs)

    conditional, empty = family.encode(["a knife"]), family.encode([""])
    trajectories = Trajectories(family.make_scheduler, family.latent_shape, steps, guidance_scale)
    generator = torch.Generator().manual_seed(5)
    latents, timesteps = trajectories.sample(predict, conditional, empty, [[steps - 1]], [generator])
    with torch.no_grad():
        uncond, cond = predict(latents, timesteps, empty), predict(latents, timesteps, conditional)
    scheduler = family.make_scheduler()
    scheduler.set_timesteps(steps)
    guided = uncond + guidance_scale * (cond - uncond)
    last = scheduler.step(guided, timesteps[0], latents).prev_sample
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


def test_sdd_learns_from_a_concept_and_nothing_from_the_empty_prompt(pipeline, batch):
    family = make_family(pipeline)
    weights = TrainedWeights(family.denoiser, select_parameters(family.denoiser, "xattn"), ema_decay=0.9)
    predictor = Predictor(family, weights, ["knife"])
    nothing = SDDObjective().loss(predictor, TrainingBatch(*batch, ["", ""]))
    assert nothing.max() < 1e-9
    loss = SDDObjective().loss(predictor, TrainingBatch(*batch, ["knife", "knife"]))
    loss.mean().backward()
    gradients = {name: parameter.grad for name, parameter in weights.student.items()}
    assert (loss > 0).all() and all(torch.isfinite(value).all() for value in gradients.values())
    assert any(value.abs().max() > 0 for value in gradients.values())


def test_a_subclass_of_the_pipeline_is_of_its_family(pipeline):
    class Mine(StableDiffusionPipeline):
        pass

    parts = {**pipeline.components, "requires_safety_checker": False}
    assert isinstance(make_family(Mine(**parts)), StableDiffusionFamily)


def test_another_pipeline_is_refused_by_name():
    class SanaPipeline:
        pass

    with pytest.raises(ValueError, match="SanaPipeline.*not supported.*StableDiffusionPipeline"):
        make_family(SanaPipeline())


def test_check_model(tiny_model_folder, tmp_path):
    StoredModel(tiny_model_folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    for path in (tmp_path / "nowhere", tmp_path / "empty", tmp_path / "broken"):
        with pytest.raises(ValueError) as error:
            StoredModel(str(path))
        assert str(path) in str(error.value) and "model_index.json" in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "sana").mkdir()
    (tmp_path / "sana" / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ValueError, match="SanaPipeline.*StableDiffusionPipeline"):
        StoredModel(str(tmp_path / "sana"))
