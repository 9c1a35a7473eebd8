"""Every pipeline of diffusers with a UNet2DConditionModel: Safe Latent Diffusion steers it, or refuses it by name."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image

from diffusers_safe import (
    SafetyConfig,
    StableDiffusionImg2ImgPipelineSafe,
    StableDiffusionPipelineSafe,
    enable_safe_latent_diffusion,
)


STEERED = [
    "AltDiffusionImg2ImgPipeline",
    "AltDiffusionPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionLDM3DPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPipeline",
]
# What all tests would be repeated for: no models small enough of their text encoder's class.
NOT_BUILT = ["AltDiffusionImg2ImgPipeline", "AltDiffusionPipeline"]
IMAGE, MASK = Image.new("RGB", (64, 64), (200, 30, 90)), Image.new("L", (64, 64), 255)


def around_a_unet():
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None)
        if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline:
            unet = inspect.signature(kind.__init__).parameters.get("unet")
            if unet is not None and "UNet2DConditionModel" in str(unet.annotation):
                yield name, kind, unet.annotation is UNet2DConditionModel


def config_of(model, kind):
    known = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in model.config.items() if name in known}


def build(name, pipeline):
    """A pipeline of this class from the parts of a tiny one, and what a call of it needs beside the prompt."""
    kind, is_xl, call = getattr(diffusers, name), "XL" in name, {}
    parts = dict(pipeline.components)
    unet = parts["unet"]
    torch.manual_seed(1)
    takes_image = "Img2Img" in name or "Inpaint" in name
    if takes_image:
        call |= {"image": IMAGE, "strength": 1.0}
    if "Inpaint" in name:
        call["mask_image"] = MASK
    if "ControlNet" in name:
        control = ControlNetUnionModel if "Union" in name else ControlNetModel
        sizes = {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8} if "Union" in name else {}
        embedding = {"conditioning_embedding_out_channels": (4, 8, 8, 8)}
        parts["controlnet"] = control(**{**config_of(unet, control), **embedding, **sizes}).eval()
        call["control_image" if takes_image or "Union" in name else "image"] = [IMAGE] if "Union" in name else IMAGE
        call |= {"control_mode": [0]} if "Union" in name else {}
    if "Adapter" in name:
        channels, factor = ([8, 16, 16], 16) if is_xl else ([8, 16, 16, 16], 8)
        kind_of = "full_adapter_xl" if is_xl else "full_adapter"
        parts["adapter"] = T2IAdapter(3, channels, 1, factor, kind_of).eval()
        call["image"] = IMAGE
    if "Depth2Img" in name:
        parts["unet"] = UNet2DConditionModel(**{**config_of(unet, UNet2DConditionModel), "in_channels": 5}).eval()
        parts["depth_estimator"] = None
        call |= {"image": IMAGE, "strength": 1.0, "depth_map": torch.rand(1, 64, 64)}
    if "LDM3D" in name:
        six = {"in_channels": 6, "out_channels": 6}
        parts["vae"] = AutoencoderKL(**{**config_of(parts["vae"], AutoencoderKL), **six}).eval()
    if "PAG" in name:
        call["pag_scale"] = 0.0
    known = inspect.signature(kind.__init__).parameters
    options = {"requires_safety_checker": False, "add_watermarker": False, "pag_applied_layers": ["mid"]}
    given = {key: value for key, value in {**parts, **options}.items() if key in known}
    made = kind(**{**{key: None for key in ("image_encoder",) if key in known}, **given})
    made.set_progress_bar_config(disable=True)
    return made, call


def images(pipeline, call, **options):
    own = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np", **call, **options}
    output = pipeline("a knife", generator=torch.Generator().manual_seed(0), **own)
    return np.asarray(getattr(output, "images", getattr(output, "rgb", None))), output


def test_each_pipeline_of_diffusers_steers_or_is_refused_by_name(tiny_pipeline):
    accepted = []
    for name, kind, keeps_it in around_a_unet():
        pipeline = object.__new__(kind)
        pipeline.__dict__["unet"] = tiny_pipeline.unet if keeps_it else object()  # AnimateDiff makes another of it
        pipeline.__dict__["scheduler"] = tiny_pipeline.scheduler
        try:
            enable_safe_latent_diffusion(pipeline)
        except ValueError as error:
            assert str(error).startswith(name) and "Safe Latent Diffusion does not support it" in str(error)
        else:
            accepted.append(name)
    assert accepted == STEERED


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated")
@pytest.mark.parametrize("name", [name for name in STEERED if name not in NOT_BUILT])
def test_what_is_accepted_is_steered_in_each_step(name, make_tiny_pipeline, make_tiny_xl_pipeline):
    pipeline, call = build(name, (make_tiny_xl_pipeline if "XL" in name else make_tiny_pipeline)())
    plain, _ = images(pipeline, call)
    encoded = [pipeline.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
               for text in ("a knife", "a weapon")]  # fmt: skip
    enable_safe_latent_diffusion(pipeline, "a weapon", SafetyConfig.MAX)
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    steered, output = images(pipeline, call)
    assert output.applied_safety_concept == "a weapon" and not np.allclose(steered, plain, atol=1e-4)
    assert len(seen) == 2
    for hidden_states in seen:  # without the prompt, with it, and the concept
        assert len(hidden_states) == 3
        for row, (embeds, *_) in zip(hidden_states[1:], encoded):
            torch.testing.assert_close(row[None], embeds)
    if "PAG" in name:
        with pytest.raises(ValueError, match=f"^{name} does not predict with and without the prompt in one batch"):
            images(pipeline, call, pag_scale=3.0)


def test_panorama_is_refused_and_guidance_scale_is_not_blamed(tiny_pipeline):
    class Mine(diffusers.StableDiffusionPanoramaPipeline):
        pass

    pipeline = Mine(**tiny_pipeline.components, requires_safety_checker=False)
    with pytest.raises(
        ValueError, match="^Mine: Safe Latent Diffusion does not support it: it calls its denoiser for each"
    ):
        enable_safe_latent_diffusion(pipeline)
    assert type(pipeline) is Mine


def test_guidance_that_is_computed_elsewhere_is_an_error_at_the_default_scale(tiny_pipeline):
    class Elsewhere(StableDiffusionPipeline):
        do_classifier_free_guidance = False

    pipeline = Elsewhere(**tiny_pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    enable_safe_latent_diffusion(pipeline, "a weapon", SafetyConfig.MAX)
    with pytest.raises(ValueError, match="says that it does not guide .* though guidance_scale is 7.5: it computes"):
        pipeline("a knife", num_inference_steps=1, output_type="np")


# --- from_pipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image, DiffusionPipeline])
def test_from_pipe_of_a_stock_class_warns_that_it_does_not_steer(tiny_pipeline, target):
    enable_safe_latent_diffusion(tiny_pipeline, "a weapon")
    target = StableDiffusionPipeline if target is DiffusionPipeline else target
    with pytest.warns(UserWarning, match=f"not passed on by {target.__name__}.from_pipe") as told:
        made = target.from_pipe(tiny_pipeline)
    assert not hasattr(made, "_safety") and told[0].filename == __file__


def test_from_pipe_of_a_safe_pipeline_warns_only_for_stock_classes(tiny_pipeline, recwarn):
    safe = StableDiffusionPipelineSafe.from_pipe(tiny_pipeline, safety_concept="a weapon")
    assert isinstance(StableDiffusionImg2ImgPipelineSafe.from_pipe(safe), StableDiffusionImg2ImgPipelineSafe)
    assert not [warning for warning in recwarn if "from_pipe" in str(warning.message)]
    with pytest.warns(UserWarning, match="StableDiffusionPipelineSafe is not passed on by StableDiffusionPipeline.fr"):
        StableDiffusionPipeline.from_pipe(safe)


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "tokenizer_2"])
def test_a_pipeline_without_a_part_that_each_call_needs_is_refused_at_once(tiny_pipeline, make_tiny_xl_pipeline, part):
    pipeline = make_tiny_xl_pipeline() if part == "tokenizer_2" else tiny_pipeline
    pipeline.register_modules(**{part: None})
    with pytest.raises(ValueError, match=f"has no {part}: give it one"):
        enable_safe_latent_diffusion(pipeline)


def test_without_a_vae_there_are_latents_only(tiny_pipeline):
    tiny_pipeline.register_modules(vae=None)
    enable_safe_latent_diffusion(tiny_pipeline, config="max")
    with pytest.raises(ValueError, match="has no vae: pass output_type='latent'"):
        tiny_pipeline("a knife", num_inference_steps=2)
    assert tiny_pipeline("a knife", num_inference_steps=2, output_type="latent").applied_safety_concept


@pytest.mark.parametrize("component, named", [("unet", "unet is in torch.bfloat16, text_encoder in torch.float32"),
                                              ("text_encoder", "text_encoder in torch.bfloat16")])  # fmt: skip
def test_a_pipeline_in_two_dtypes_is_refused_before_it_samples_unless_autocast_joins_them(
    tiny_pipeline, component, named
):
    getattr(tiny_pipeline, component).to(torch.bfloat16)
    enable_safe_latent_diffusion(tiny_pipeline, config="max")
    with pytest.raises(ValueError, match=named):
        tiny_pipeline("a knife", num_inference_steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny_pipeline("a knife", num_inference_steps=2, output_type="latent")
    assert output.applied_safety_concept
