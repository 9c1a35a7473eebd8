"""The Stable Diffusion pipelines with SLD, against diffusers' deprecated one and among themselves."""

import copy
import inspect
import threading
import warnings

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe as ReferencePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_safe import (
    SAFETY_CONCEPT,
    SafetyConfig,
    StableDiffusionImg2ImgPipelineSafe,
    StableDiffusionInpaintPipelineSafe,
    StableDiffusionPipelineSafe,
)
from diffusers_safe.pipelines.guidance import SAFETY_CONFIGS


SCHEDULERS = [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
ALWAYS = {"sld_warmup_steps": 0}


@pytest.fixture(scope="module")
def stock(make_tiny_pipeline):
    return attentive(make_tiny_pipeline())


def attentive(pipeline):
    """With random weights the prompt hardly matters. Here it does."""
    for name, parameter in pipeline.unet.named_parameters():
        if "attn2.to_out" in name or "attn2.to_v" in name:
            parameter.data *= 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def safe_around(stock):
    pipeline = StableDiffusionPipelineSafe(
        **stock.components, requires_safety_checker=False, safety_concept="a weapon"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def safe(stock):
    return safe_around(stock)


def same(first, second):
    """Up to rounding: where an array lies in memory can change the last digits of a convolution."""
    return np.allclose(first, second, atol=1e-4)


def draw(pipeline, prompt="a knife", seed=0, **options):
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np", **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options)


# --- the equations as the pipeline applies them ----------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", SAFETY_CONFIGS)
def test_equals_the_deprecated_pipeline_of_diffusers(stock, name, scheduler):
    config = dict(SAFETY_CONFIGS[name])
    if name == "weak":
        config["sld_guidance_scale"] = 20  # diffusers' value
    config["sld_warmup_steps"] = min(config["sld_warmup_steps"], 4)  # of 8 steps
    parts = {**stock.components, "scheduler": scheduler.from_config(stock.scheduler.config)}
    reference = ReferencePipeline(**parts, requires_safety_checker=False)
    ours = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False)
    reference.safety_concept = ours.safety_concept = "a weapon, violence"
    images = []
    for pipeline in (reference, ours):
        pipeline.set_progress_bar_config(disable=True)
        images.append(
            draw(pipeline, ["a knife", "a cat"], num_images_per_prompt=2, num_inference_steps=8, **config).images
        )
    assert images[0].shape == (4, 64, 64, 3)
    assert np.abs(images[0] - images[1]).max() < 1e-4
    plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    without = draw(plain, ["a knife", "a cat"], num_images_per_prompt=2, num_inference_steps=8).images
    assert np.abs(images[1] - without).max() > 1e-3  # it does something


def test_the_default_concept_is_that_of_diffusers(stock):
    assert SAFETY_CONCEPT == ReferencePipeline(**stock.components, requires_safety_checker=False).safety_concept
    assert StableDiffusionPipelineSafe(**stock.components).safety_concept == SAFETY_CONCEPT


def test_the_call_takes_everything_the_stock_call_takes():
    for ours, stock in (
        (StableDiffusionPipelineSafe, StableDiffusionPipeline),
        (StableDiffusionImg2ImgPipelineSafe, StableDiffusionImg2ImgPipeline),
        (StableDiffusionInpaintPipelineSafe, StableDiffusionInpaintPipeline),
    ):
        mine, theirs = (inspect.signature(cls.__call__).parameters for cls in (ours, stock))
        added = [name for name in mine if name not in theirs]
        assert added == [*SafetyConfig().keys(), "safety_concept", "safety_prompt_embeds"]
        for name, parameter in theirs.items():
            assert (mine[name].default, mine[name].kind) == (parameter.default, parameter.kind), name
        assert {name: mine[name].default for name in SafetyConfig().keys()} == dict(SafetyConfig.MEDIUM)


# --- when it is off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"sld_guidance_scale": 1}, "sld_guidance_scale 1 is not above 1"),
        ({"guidance_scale": 1.0}, "classifier-free guidance was off"),
        ({"sld_warmup_steps": 9}, "warm-up of 9 is not shorter than the 4 steps"),
    ],
)
def test_a_call_without_effect_says_why_and_claims_no_concept(stock, safe, options, reason):
    with pytest.warns(UserWarning, match=reason):
        output = draw(safe, **options)
    assert output.applied_safety_concept is None
    plain = {name: value for name, value in options.items() if not name.startswith("sld")}
    assert same(output.images, draw(stock, **plain).images)


def test_a_call_with_effect_is_silent_and_names_the_concept(safe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(safe, **ALWAYS).applied_safety_concept == "a weapon"
        assert draw(safe, **ALWAYS, safety_concept="a gun").applied_safety_concept == "a gun"
    assert safe.safety_concept == "a weapon"


def test_guidance_that_stops_half_way_stops_sld_with_it(stock, safe):
    def cut(pipeline, step, timestep, values):
        if step == 1:
            pipeline._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    options = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    output = draw(safe, **ALWAYS, **options)
    assert output.applied_safety_concept == "a weapon"
    assert not np.allclose(output.images, draw(stock, **options).images, atol=1e-3)


# --- what a call leaves behind ---------------------------------------------------------------------------------------


def test_a_call_that_fails_leaves_nothing(stock, safe):
    def fail(pipeline, step, timestep, values):
        assert pipeline.components["unet"] is stock.unet  # what moves models sees the real one
        raise RuntimeError("stop")

    before = dict(safe.config)
    with pytest.raises(RuntimeError, match="stop"):
        draw(safe, callback_on_step_end=fail)
    assert safe.unet is stock.unet and dict(safe.config) == before


def test_a_call_within_a_call_is_refused_and_harms_nothing(stock, safe):
    def again(pipeline, step, timestep, values):
        with pytest.raises(RuntimeError, match="is generating already"):
            draw(pipeline, **ALWAYS)
        assert copy.copy(pipeline.unet).config is stock.unet.config
        return values

    expected = draw(safe, **ALWAYS).images
    assert same(draw(safe, **ALWAYS, callback_on_step_end=again).images, expected)
    assert safe.unet is stock.unet


def test_calls_do_not_remember_each_other(safe):
    first, _, again = (draw(safe, **SafetyConfig.MAX, seed=seed).images for seed in (0, 1, 0))
    assert same(first, again)


def test_a_pipeline_that_shares_the_denoiser_is_not_steered(stock, safe):
    seen = []

    def use_stock_meanwhile(pipeline, step, timestep, values):
        seen.append(draw(stock).images)
        return values

    plain = draw(stock).images
    alone = draw(safe, **ALWAYS).images
    together = draw(safe, **ALWAYS, callback_on_step_end=use_stock_meanwhile).images
    assert same(alone, together) and all(same(images, plain) for images in seen)


def test_threads_with_a_pipeline_each_share_a_denoiser(stock):
    def pipeline_for(concept):
        pipeline = StableDiffusionPipelineSafe(**stock.components, safety_concept=concept)
        # A scheduler and a tokenizer have a state of their own, and are never shared between threads.
        pipeline.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
        pipeline.tokenizer = copy.deepcopy(stock.tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    concepts = ["a weapon", "a cat", "a fruit"]
    alone = [draw(pipeline_for(concept), **SafetyConfig.MAX).images for concept in concepts]
    together = [None] * 3

    def work(index):
        together[index] = draw(pipeline_for(concepts[index]), **SafetyConfig.MAX).images

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.allclose(one, other, atol=1e-5) for one, other in zip(alone, together))
    assert not np.allclose(alone[0], alone[1], atol=1e-3)


@pytest.mark.parametrize(
    "config, expected",
    [
        (SafetyConfig(1000, 2, 0.01, 0.0, 0.0), [2, 2, 3, 3]),  # without momentum the warm-up needs no third branch
        (SafetyConfig(1000, 2, 0.01, 0.3, 0.4), [3, 3, 3, 3]),
    ],
)
def test_the_third_branch_only_runs_where_it_matters(stock, safe, config, expected):
    batches = []
    handle = stock.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    try:
        draw(safe, **config)
    finally:
        handle.remove()
    assert batches == expected


def test_heun_counts_denoiser_calls(stock, safe):
    safe.scheduler = HeunDiscreteScheduler.from_config(stock.scheduler.config)
    with pytest.warns(UserWarning, match="warm-up of 7 is not shorter than the 7 steps"):
        draw(safe, sld_warmup_steps=7)
    assert draw(safe, sld_warmup_steps=6).applied_safety_concept == "a weapon"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_tiny_pipeline, dtype):
    stock = attentive(make_tiny_pipeline()).to(dtype)
    pipeline = StableDiffusionPipelineSafe(**stock.components, safety_concept="a weapon")
    pipeline.set_progress_bar_config(disable=True)
    plain = StableDiffusionPipeline(**stock.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    output = draw(pipeline, **SafetyConfig.MAX)
    assert output.applied_safety_concept == "a weapon" and np.isfinite(output.images).all()
    assert np.abs(output.images - draw(plain).images).max() > 1e-2


# --- what may be done to a pipeline beside ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["module", pytest.param("in place", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_compiled_denoiser_stays_compiled(make_tiny_pipeline, way):
    stock = attentive(make_tiny_pipeline())
    expected = draw(safe_around(stock), **SafetyConfig.MAX).images
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if way == "module":
        stock.unet = torch.compile(stock.unet, backend=backend)
    else:
        stock.unet.compile(backend=backend)
    output = draw(safe_around(stock), **SafetyConfig.MAX)
    torch.compiler.reset()
    assert graphs and same(output.images, expected)
    assert output.applied_safety_concept == "a weapon"


def test_an_offloaded_denoiser_is_loaded_for_each_call_and_put_back(make_tiny_pipeline):
    stock = attentive(make_tiny_pipeline())
    expected = draw(safe_around(stock), **SafetyConfig.MAX).images
    accelerate.cpu_offload(stock.unet, execution_device=torch.device("cpu"))
    pipeline = safe_around(stock)
    assert same(draw(pipeline, **SafetyConfig.MAX).images, expected)
    assert all(parameter.device.type == "meta" for parameter in stock.unet.parameters())


def test_lora_goes_in_scales_and_comes_out(make_tiny_pipeline, tmp_path):
    pipeline = safe_around(attentive(make_tiny_pipeline()))
    plain = draw(pipeline, **SafetyConfig.MAX).images
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    adapted = draw(pipeline, **SafetyConfig.MAX).images
    assert not same(adapted, plain)
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    pipeline.unet.delete_adapters(pipeline.unet.active_adapters())
    assert same(draw(pipeline, **SafetyConfig.MAX).images, plain)

    pipeline.load_lora_weights(tmp_path)
    assert same(draw(pipeline, **SafetyConfig.MAX).images, adapted)
    without = draw(pipeline, **SafetyConfig.MAX, cross_attention_kwargs={"scale": 0.0}).images
    assert same(without, plain)
    pipeline.unload_lora_weights()
    assert same(draw(pipeline, **SafetyConfig.MAX).images, plain)


def test_ip_adapter(make_tiny_pipeline):
    stock = attentive(make_tiny_pipeline())
    pipeline = safe_around(stock)
    plain = draw(pipeline, **SafetyConfig.MAX).images
    stock.unet._load_ip_adapter_weights([ip_adapter_weights(stock.unet)])
    image_embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    given = {"ip_adapter_image_embeds": [image_embeds]}
    stock.set_ip_adapter_scale(1.0)
    unsteered = draw(StableDiffusionPipeline.from_pipe(stock), **given).images
    output = draw(pipeline, **SafetyConfig.MAX, **given)
    assert output.applied_safety_concept == "a weapon"
    assert not same(output.images, unsteered) and not same(output.images, plain)
    stock.set_ip_adapter_scale(0.0)
    assert same(draw(pipeline, **SafetyConfig.MAX, **given).images, plain)


def ip_adapter_weights(unet, width=16):
    """An IP-Adapter of the first kind (four image tokens) with random weights."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    text_width, layers = unet.config.cross_attention_dim, {}
    number = 1
    for name in unet.attn_processors:
        if "attn2" in name:
            width_here = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            layers |= {f"{number}.to_{part}_ip.weight": random(width_here, text_width) for part in ("k", "v")}
            number += 2
    projection = {
        "proj.weight": random(4 * text_width, width),
        "proj.bias": random(4 * text_width),
        "norm.weight": random(text_width),
        "norm.bias": random(text_width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_the_concept_as_embeddings_is_the_same(safe):
    embeds, _ = safe.encode_prompt("a weapon", "cpu", 1, False)
    output = draw(safe, **SafetyConfig.MAX, safety_prompt_embeds=embeds)
    assert output.applied_safety_concept == ""
    assert np.allclose(output.images, draw(safe, **SafetyConfig.MAX).images, atol=1e-4)


def test_embeddings_of_the_pipeline_carry_its_concept_to_one_without_text_encoder(stock, safe):
    embeds, negative = safe.encode_prompt("a knife", "cpu", 1, True)
    parts = {**stock.components, "text_encoder": None, "tokenizer": None}
    deaf = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False, safety_concept="a weapon")
    deaf.set_progress_bar_config(disable=True)
    options = {**SafetyConfig.MAX, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert np.allclose(draw(deaf, None, **options).images, draw(safe, **SafetyConfig.MAX).images, atol=1e-4)
    with pytest.raises(ValueError, match="no text encoder for the safety concept: pass safety_prompt_embeds"):
        draw(deaf, None, **{**options, "prompt_embeds": embeds.clone()})


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sld_guidance_scale": -1}, "sld_guidance_scale -1: must be at least 0"),
        ({"sld_mom_beta": 1.0}, r"sld_mom_beta 1.0: must be in \[0, 1\)"),
        ({"sld_warmup_steps": -1}, "sld_warmup_steps -1: must be at least 0"),
        ({"sld_guidance_scale": float("inf")}, "sld_guidance_scale inf: must be a finite number"),
        ({"safety_pooled_prompt_embeds": torch.zeros(1, 3)}, "unknown arguments safety_pooled_prompt_embeds"),
        ({"sld_warmup": 0}, "unknown arguments sld_warmup"),
        ({"safety_concept": " "}, "safety_concept ' ': must be a text that is not blank"),
        ({"safety_concept": "x", "safety_prompt_embeds": torch.zeros(1, 32, 32)}, "not both"),
        ({"safety_prompt_embeds": torch.zeros(1, 7, 32)}, r"\(1, 7, 32\).*\(1, 32, 32\).*same shape"),
    ],
)
def test_bad_input_is_one_clear_line(safe, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        draw(safe, **options)


def test_a_concept_too_long_for_the_tokenizer_is_told(safe, caplog):
    import logging

    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            draw(safe, **ALWAYS, safety_concept="knife " * 40 + "sword")
    finally:
        diffusers_logging.disable_propagation()
    assert "truncated" in caplog.text and "knife sword" in caplog.text


# --- the siblings ----------------------------------------------------------------------------------------------------


def picture():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "cls, inputs",
    [
        (StableDiffusionImg2ImgPipelineSafe, {"image": picture(), "strength": 0.75}),
        (
            StableDiffusionInpaintPipelineSafe,
            {"image": picture(), "mask_image": torch.ones(1, 1, 64, 64), "height": 64, "width": 64},
        ),
    ],
)
def test_the_siblings_are_stock_without_sld_and_steer_with_it(stock, cls, inputs):
    pipeline = cls(**stock.components, requires_safety_checker=False, safety_concept="a weapon")
    plain = next(c for c in cls.__mro__ if c.__module__.startswith("diffusers.pipelines.stable_diffusion"))
    plain = plain(**stock.components, requires_safety_checker=False)
    for each in (pipeline, plain):
        each.set_progress_bar_config(disable=True)
    reference = draw(plain, **inputs).images
    with pytest.warns(UserWarning, match="off"):
        assert same(draw(pipeline, sld_guidance_scale=0, **inputs).images, reference)
    output = draw(pipeline, **SafetyConfig.MAX, **inputs)
    assert output.applied_safety_concept == "a weapon"
    assert not np.allclose(output.images, reference, atol=1e-3)


def test_from_pipe_both_ways(stock, safe):
    there = StableDiffusionImg2ImgPipelineSafe.from_pipe(safe)
    assert there.safety_concept == "a weapon" and there.unet is stock.unet
    back = StableDiffusionPipelineSafe.from_pipe(StableDiffusionPipeline.from_pipe(safe))
    assert back.safety_concept == "a weapon"
    assert StableDiffusionPipelineSafe.from_pipe(stock).safety_concept == SAFETY_CONCEPT
    assert StableDiffusionPipelineSafe.from_pipe(stock, safety_concept="a gun").safety_concept == "a gun"
    again = StableDiffusionPipeline.from_pipe(safe)
    again.set_progress_bar_config(disable=True)
    assert same(draw(again).images, draw(stock).images)
