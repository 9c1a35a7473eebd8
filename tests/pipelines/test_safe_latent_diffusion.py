"""SLD on pipelines of other kinds: SDXL, ControlNet, and those it cannot steer."""

import inspect
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import hub_utils

from diffusers_safe import (
    SafetyConfig,
    StableDiffusion3PipelineSafe,
    StableDiffusionXLPipelineSafe,
    disable_safe_latent_diffusion,
    enable_safe_latent_diffusion,
)
from diffusers_safe.generation.generate import pipeline_fingerprint
from diffusers_safe.pipelines import safe_denoiser
from diffusers_safe.pipelines.guidance import SafetyState, guide_safely
from diffusers_safe.pipelines.safe_denoiser import SafeDenoiser


def same(first, second):
    """Up to rounding: where an array lies in memory can change the last digits of a convolution."""
    return np.allclose(first, second, atol=1e-4)


def draw(pipeline, prompt="a knife", **options):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np", **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **options)


# --- enable and disable ----------------------------------------------------------------------------------------------


def test_enabled_steers_and_disabled_is_stock_again(tiny_pipeline, tmp_path):
    plain = draw(tiny_pipeline).images
    assert enable_safe_latent_diffusion(tiny_pipeline, "a weapon", SafetyConfig.MAX) is tiny_pipeline
    assert isinstance(tiny_pipeline, StableDiffusionPipeline)
    assert inspect.signature(type(tiny_pipeline).__call__) == inspect.signature(StableDiffusionPipeline.__call__)
    output = draw(tiny_pipeline)
    assert output.applied_safety_concept == "a weapon" and not same(output.images, plain)
    with pytest.warns(UserWarning, match="off"):
        off = draw(tiny_pipeline, sld_guidance_scale=0)
    assert off.applied_safety_concept is None and same(off.images, plain)
    assert draw(tiny_pipeline, safety_concept="a cat").applied_safety_concept == "a cat"
    assert len(draw(tiny_pipeline, return_dict=False)) == 2

    with pytest.warns(UserWarning, match="is not saved"):
        tiny_pipeline.save_pretrained(tmp_path)
    assert np.allclose(draw(StableDiffusionPipeline.from_pretrained(tmp_path)).images, plain, atol=1e-3)

    assert disable_safe_latent_diffusion(tiny_pipeline) is tiny_pipeline
    assert type(tiny_pipeline) is StableDiffusionPipeline and same(draw(tiny_pipeline).images, plain)


def test_saving_an_enabled_pipeline_warns_once_that_sld_is_not_saved(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_utils, "create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(StableDiffusionPipeline, "_upload_folder", lambda *_, **__: "a commit")

    def save(pipeline):
        assert pipeline.push_to_hub("user/name", subfolder="part") == "a commit"
        pipeline.save_pretrained(tmp_path / "saved")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save(enable_safe_latent_diffusion(tiny_pipeline, "a weapon"))
    told = [warning for warning in told if "Safe Latent Diffusion" in str(warning.message)]
    assert len(told) == 2 and {warning.filename for warning in told} == {__file__}
    assert all("StableDiffusionPipeline is not saved" in str(warning.message) for warning in told)
    assert "\n" not in str(told[0].message)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save(disable_safe_latent_diffusion(tiny_pipeline))
    assert not [warning for warning in told if "Safe Latent Diffusion" in str(warning.message)]


def test_enabling_twice_and_disabling_what_is_not_enabled_are_errors(tiny_pipeline):
    with pytest.raises(ValueError, match="not enabled"):
        disable_safe_latent_diffusion(tiny_pipeline)
    enable_safe_latent_diffusion(tiny_pipeline)
    with pytest.raises(ValueError, match="enabled already"):
        enable_safe_latent_diffusion(tiny_pipeline)


@pytest.mark.parametrize("config", ["max", SafetyConfig.MAX, dict(SafetyConfig.MAX)])
def test_a_config_may_be_named(make_tiny_pipeline, config):
    pipeline = enable_safe_latent_diffusion(make_tiny_pipeline(), "a weapon", config)
    assert pipeline._safety == (SafetyConfig.MAX, "a weapon")


def test_a_config_that_does_not_exist_is_refused_at_once(tiny_pipeline):
    with pytest.raises(ValueError, match="'extreme': unknown"):
        enable_safe_latent_diffusion(tiny_pipeline, "a weapon", "extreme")
    assert type(tiny_pipeline) is StableDiffusionPipeline


def test_a_misspelled_argument_is_an_error(tiny_pipeline):
    enable_safe_latent_diffusion(tiny_pipeline, "a weapon")
    with pytest.raises(TypeError, match="unknown arguments sld_warmup_step"):
        draw(tiny_pipeline, sld_warmup_step=0)


def test_an_enabled_pipeline_can_be_pickled(tiny_pipeline):
    enable_safe_latent_diffusion(tiny_pipeline, "a weapon", SafetyConfig.MAX)
    expected = draw(tiny_pipeline).images
    again = pickle.loads(pickle.dumps(tiny_pipeline))
    assert type(again) is type(tiny_pipeline) and same(draw(again).images, expected)


def test_a_pipeline_that_never_guides_is_told_of_in_the_first_call(tiny_pipeline):
    class Deaf(StableDiffusionPipeline):
        do_classifier_free_guidance = False

    pipeline = enable_safe_latent_diffusion(
        Deaf(**tiny_pipeline.components, requires_safety_checker=False), "a weapon", SafetyConfig.MAX
    )
    with pytest.raises(ValueError, match="Deaf says that it does not guide .*, though guidance_scale is 5.0"):
        draw(pipeline)
    with pytest.warns(UserWarning, match="classifier-free guidance was off"):
        draw(pipeline, guidance_scale=1.0)


def test_a_pipeline_that_does_not_guide_is_refused_at_once():
    with pytest.raises(ValueError, match="FluxPipeline has no do_classifier_free_guidance.*does not support"):
        enable_safe_latent_diffusion(object.__new__(FluxPipeline))  # without its parts
    with pytest.raises(ValueError, match="SanaPipeline has no unet of the class UNet2DCond.*does not support"):
        enable_safe_latent_diffusion(object.__new__(SanaPipeline))


def test_a_pipeline_that_does_not_pass_the_concept_on_is_refused_in_the_first_call():
    pipeline = SimpleNamespace(do_classifier_free_guidance=True)
    conditions = {"encoder_hidden_states": torch.zeros(1, 2, 3), "text_embeds": torch.zeros(1, 3)}
    denoiser = SafeDenoiser(pipeline, lambda sample, **_: (sample,), conditions, SafetyConfig.MAX)
    with pytest.raises(ValueError, match="does not pass text_embeds to its denoiser"):
        denoiser(torch.zeros(2, 4, 2, 2), encoder_hidden_states=torch.zeros(2, 2, 3))


def test_what_is_not_of_the_batch_stays_as_it_is():
    seen = {}

    def network(sample, **kwargs):
        seen.update(kwargs)
        return (sample,)

    pipeline = SimpleNamespace(do_classifier_free_guidance=True)
    masks = torch.rand(2, 1, 8, 8)  # of two IP-Adapters
    SafeDenoiser(pipeline, network, {}, SafetyConfig.MAX)(
        torch.zeros(2, 4, 2, 2), cross_attention_kwargs={"ip_adapter_masks": masks}
    )
    assert seen["cross_attention_kwargs"]["ip_adapter_masks"] is masks


def test_the_stand_in_passes_for_the_denoiser(tiny_pipeline):
    unet = tiny_pipeline.unet
    stand_in = SafeDenoiser(tiny_pipeline, unet, {}, SafetyConfig.MAX)
    assert isinstance(stand_in, UNet2DConditionModel) and isinstance(stand_in, torch.nn.Module)
    assert stand_in.config is unet.config and stand_in.dtype == unet.dtype


def test_generated_images_of_a_steered_pipeline_are_not_taken_for_stock_ones(tiny_pipeline):
    stock = pipeline_fingerprint(tiny_pipeline)
    seen = {stock, pipeline_fingerprint(enable_safe_latent_diffusion(tiny_pipeline, "a weapon"))}
    disable_safe_latent_diffusion(tiny_pipeline)
    seen.add(pipeline_fingerprint(enable_safe_latent_diffusion(tiny_pipeline, "a weapon", SafetyConfig.MAX)))
    disable_safe_latent_diffusion(tiny_pipeline)
    assert len(seen) == 3 and pipeline_fingerprint(tiny_pipeline) == stock


def test_a_pipeline_that_predicts_in_two_calls_is_refused_in_the_first():
    pipeline = SimpleNamespace(do_classifier_free_guidance=True)
    denoiser = SafeDenoiser(pipeline, lambda sample, **_: (sample,), {}, SafetyConfig.MAX)
    for sample in (torch.randn(1, 4, 2, 2), torch.randn(2, 4, 2, 2)):
        with pytest.raises(ValueError, match="one batch of two"):
            denoiser(sample)


@pytest.mark.parametrize("more", [{"do_perturbed_attention_guidance": True}, {"enabled_editing_prompts": 3}])
def test_a_pipeline_with_more_branches_is_refused_even_if_its_latents_are_equal(more):
    pipeline = SimpleNamespace(do_classifier_free_guidance=True, **more)
    denoiser = SafeDenoiser(pipeline, lambda sample, **_: (sample,), {}, SafetyConfig.MAX)
    with pytest.raises(ValueError, match="one batch of two"):
        denoiser(torch.zeros(4, 4, 2, 2))


# --- what the denoiser gets ------------------------------------------------------------------------------------------


def test_everything_of_the_batch_is_widened():
    seen = {}

    def network(sample, timestep, **kwargs):
        seen.update(kwargs, sample=sample, timestep=timestep)
        return (sample * torch.arange(1.0, 10.0).view(9, 1, 1, 1),)

    concept = torch.full((1, 5, 8), 7.0)
    conditions = {"encoder_hidden_states": concept, "text_embeds": torch.full((3, 6), 9.0)}
    pipeline = SimpleNamespace(do_classifier_free_guidance=True)
    safe = SafeDenoiser(pipeline, network, conditions, SafetyConfig.MAX)
    latents = torch.randn(3, 4, 2, 2)
    residuals = [torch.randn(6, 2), (torch.randn(6, 3),)]
    time_ids = torch.randn(6, 6)
    (prediction,) = safe(
        torch.cat([latents, latents]),
        torch.tensor(7),
        encoder_hidden_states=torch.randn(6, 5, 8),
        down_block_additional_residuals=residuals,
        added_cond_kwargs={
            "text_embeds": torch.randn(6, 6),
            "time_ids": time_ids,
            "image_embeds": [torch.randn(6, 1)],
        },
        timestep_cond=None,
        cross_attention_kwargs={"scale": 0.5},
        return_dict=False,
    )
    assert torch.equal(seen["sample"], torch.cat([latents] * 3)) and seen["timestep"].ndim == 0
    assert torch.equal(seen["encoder_hidden_states"][6:], concept.expand(3, 5, 8))
    assert torch.equal(seen["down_block_additional_residuals"][0][6:], residuals[0][3:])
    assert torch.equal(seen["down_block_additional_residuals"][1][0][6:], residuals[1][0][3:])
    added = seen["added_cond_kwargs"]
    assert (added["text_embeds"][6:] == 9).all() and torch.equal(added["time_ids"][6:], time_ids[3:])
    assert added["image_embeds"][0].shape == (9, 1)
    assert seen["cross_attention_kwargs"] == {"scale": 0.5} and seen["return_dict"] is False
    uncond, text, safety = seen["sample"].mul(torch.arange(1.0, 10.0).view(9, 1, 1, 1)).chunk(3)
    expected, _ = guide_safely(uncond, text, safety, SafetyState(), SafetyConfig.MAX)
    assert torch.equal(prediction, torch.cat([uncond, expected]))


# --- SDXL and SD3 ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["xl", "sd3", "sd3 without T5"], scope="module")
def pooled(request, make_tiny_xl_pipeline, make_tiny_sd3_pipeline):
    """Components of a model with pooled prompt embeddings, its stock class and its safe one."""
    if request.param == "xl":
        return make_tiny_xl_pipeline().components, StableDiffusionXLPipeline, StableDiffusionXLPipelineSafe
    parts = make_tiny_sd3_pipeline(t5=request.param == "sd3").components
    return parts, StableDiffusion3Pipeline, StableDiffusion3PipelineSafe


def test_a_safe_class_is_stock_without_sld_and_steers_with_it(pooled, tmp_path):
    parts, stock, safe_class = pooled
    prompts = {"prompt": ["a knife", "a cat"], "num_images_per_prompt": 2}
    safe = safe_class(**parts, safety_concept="a weapon")
    plain = draw(stock(**parts), **prompts).images
    with pytest.warns(UserWarning, match="off"):
        assert same(draw(safe, **prompts, sld_guidance_scale=1).images, plain)
    output = draw(safe, **prompts, **SafetyConfig.MAX)
    assert output.applied_safety_concept == "a weapon" and not same(output.images, plain)
    enabled = enable_safe_latent_diffusion(stock(**parts), "a weapon", SafetyConfig.MAX)
    assert same(draw(enabled, **prompts).images, output.images)

    safe.save_pretrained(tmp_path)
    again = safe_class.from_pretrained(tmp_path, **{name: None for name, part in parts.items() if part is None})
    assert np.allclose(draw(again, **prompts, **SafetyConfig.MAX).images, output.images, atol=1e-3)


def test_the_call_takes_everything_the_stock_call_takes(pooled):
    mine, theirs = (inspect.signature(cls.__call__).parameters for cls in (pooled[2], pooled[1]))
    added = ["safety_concept", "safety_prompt_embeds", "safety_pooled_prompt_embeds"]
    assert [name for name in mine if name not in theirs] == [*SafetyConfig().keys(), *added]
    for name, parameter in theirs.items():
        assert (mine[name].default, mine[name].kind) == (parameter.default, parameter.kind), name


def test_the_concept_may_be_embeddings_with_pooled_ones(pooled):
    safe = pooled[2](**pooled[0], safety_concept="a weapon")
    others = {
        name: None for name in ("prompt_2", "prompt_3") if name in inspect.signature(safe.encode_prompt).parameters
    }
    embeds, _, of_text, _ = safe.encode_prompt("a weapon", **others, device="cpu", do_classifier_free_guidance=False)
    given = {"safety_prompt_embeds": embeds, "safety_pooled_prompt_embeds": of_text}
    with_embeds = draw(safe, **SafetyConfig.MAX, **given).images
    assert same(with_embeds, draw(safe, **SafetyConfig.MAX).images)
    assert not same(with_embeds, draw(safe).images)
    with pytest.raises(ValueError, match="safety_pooled_prompt_embeds"):
        draw(safe, safety_prompt_embeds=embeds)


def test_sd3_is_steered_at_every_call_by_its_velocities(make_tiny_sd3_pipeline, monkeypatch):
    parts, seen, guided = make_tiny_sd3_pipeline().components, [], []
    safe = StableDiffusion3PipelineSafe(**parts, safety_concept="a weapon")
    forward = safe.transformer.forward

    def watched(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append((kwargs, output[0]))
        return output

    def watching(*args):
        guided.append(args[:3])
        return guide_safely(*args)

    monkeypatch.setattr(safe.transformer, "forward", watched)
    monkeypatch.setattr(safe_denoiser, "guide_safely", watching)
    draw(safe, ["a knife", "a cat"], max_sequence_length=48, **SafetyConfig.MAX)
    monkeypatch.undo()
    with torch.no_grad():
        tokens, _, pooled_states, _ = safe.encode_prompt(
            "a weapon", None, None, do_classifier_free_guidance=False, max_sequence_length=48
        )
    assert len(seen) == len(guided) == 3
    for (given, velocities), predictions in zip(seen, guided):
        assert torch.equal(velocities, torch.cat(predictions)) and len(velocities) == 6
        torch.testing.assert_close(given["encoder_hidden_states"][4:], tokens.expand(2, -1, -1))
        torch.testing.assert_close(given["pooled_projections"][4:], pooled_states.expand(2, -1))
        assert torch.equal(given["hidden_states"][2:4], given["hidden_states"][4:])


def test_sd3_is_not_steered_together_with_guidance_by_skipped_layers(make_tiny_sd3_pipeline):
    safe = StableDiffusion3PipelineSafe(**make_tiny_sd3_pipeline().components)
    with pytest.raises(ValueError, match="skip_guidance_layers: Safe Latent Diffusion does not go with it"):
        draw(safe, num_inference_steps=20, skip_guidance_layers=[0])


# --- ControlNet ------------------------------------------------------------------------------------------------------


def test_controlnet(tiny_pipeline):
    controlnet = ControlNetModel.from_unet(tiny_pipeline.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    for parameter in controlnet.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    parts = {**tiny_pipeline.components, "controlnet": controlnet}
    pipeline = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    options = {"image": image, "controlnet_conditioning_scale": 0.5}
    plain = [draw(pipeline, guess_mode=guess_mode, **options).images for guess_mode in (False, True)]
    enable_safe_latent_diffusion(pipeline, "a weapon", SafetyConfig.MAX)
    for guess_mode in (False, True):
        output = draw(pipeline, guess_mode=guess_mode, **options)
        assert output.applied_safety_concept == "a weapon"
        assert not np.allclose(output.images, plain[guess_mode], atol=1e-4)
