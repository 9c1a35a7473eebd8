"""A model and its ways of steering: what comes out is what the stock pipelines do with them."""

import numpy as np
import pytest
import torch
from diffusers import SemanticStableDiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_safe.generation.generate import GenerationSettings, pipeline_fingerprint, sample_images
from diffusers_safe.generation.models import SteeredModel
from diffusers_safe.pipelines.guidance import SafetyConfig


SETTINGS = GenerationSettings(num_inference_steps=3, guidance_scale=4.0)


@pytest.fixture(scope="module")
def lora(make_tiny_pipeline, tmp_path_factory):
    """A folder with a LoRA of attention and convolution layers."""
    unet = make_tiny_pipeline().unet
    layers = r"(mid_block|up_blocks\.1)\..*(to_k|conv1)"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, tensors)
    return folder


def drawn(pipeline, settings):
    return np.stack([np.asarray(image) for image in sample_images(pipeline, ["a cat"] * 2, [0, 1], settings)])


def test_a_plain_model_is_loaded_as_it_is(tiny_model_folder, make_tiny_pipeline):
    pipeline, settings = SteeredModel("plain", tiny_model_folder).load(SETTINGS)
    assert settings == SETTINGS and pipeline_fingerprint(pipeline) == pipeline_fingerprint(make_tiny_pipeline())
    pipeline, settings = SteeredModel("negative", tiny_model_folder, negative_prompt="a gun", dtype="bfloat16").load(
        SETTINGS
    )
    assert settings.negative_prompt == "a gun" and pipeline.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_fused_lora_draws_what_the_stock_adapter_draws(tiny_model_folder, make_tiny_pipeline, lora, scale):
    pipeline, settings = SteeredModel("lora", tiny_model_folder, lora=str(lora), lora_scale=scale).load(SETTINGS)
    stock = make_tiny_pipeline()
    before = drawn(stock, SETTINGS).astype(int)
    stock.load_lora_weights(lora, adapter_name="own")
    stock.set_adapters(["own"], [scale])
    images = drawn(pipeline, settings).astype(int)
    assert np.abs(images - drawn(stock, SETTINGS)).max() <= 1 and np.abs(images - before).max() > 3
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())


def test_no_share_of_a_lora_is_the_model(tiny_model_folder, make_tiny_pipeline, lora):
    pipeline, _ = SteeredModel("none", tiny_model_folder, lora=str(lora), lora_scale=0.0).load(SETTINGS)
    assert pipeline_fingerprint(pipeline) == pipeline_fingerprint(make_tiny_pipeline())
    file = lora / "pytorch_lora_weights.safetensors"
    pipeline, _ = SteeredModel("half", tiny_model_folder, lora=str(file), dtype="bfloat16").load(SETTINGS)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, value: {name.replace("mid_block", "mid_blok"): value},
            "[0-9] of its [0-9]+ layers have no place",
        ),
        (
            lambda name, value: {name.replace("unet.", "transformer."): value},
            r"([0-9]+) of its \1 layers have no place",
        ),
        (
            lambda name, value: {name: torch.cat([value, value]) if ".up." in name else value},
            "does not fit StableDiffusionPipeline",
        ),
        (lambda name, value: {name: torch.cat([value, value], 1)}, "do not make a pair"),
        (lambda name, value: {name: value / 0}, "holds values that are not finite numbers"),
        (lambda name, value: {name: value * 1e30}, "other.safetensors: lora_scale 1: NaNs"),
        (lambda name, value: {"weight": value}, "and no LoRA"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tiny_model_folder, lora, tmp_path, change, message):
    changed = {}
    for name, value in load_file(lora / "pytorch_lora_weights.safetensors").items():
        changed |= change(name, value)
    save_file(changed, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        SteeredModel("other", tiny_model_folder, lora=str(tmp_path / "other.safetensors")).load(SETTINGS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
@pytest.mark.parametrize("number", [1, 999])
def test_a_lora_without_partners_says_what_is_missing(tiny_model_folder, lora, tmp_path, lost, number):
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    names = [name for name in tensors if lost in name][:number]
    save_file({name: value for name, value in tensors.items() if name not in names}, tmp_path / "half.safetensors")
    message = f"half.safetensors: {len(names)} of its .* have no partner: {names[0]} is missing"
    with pytest.raises(ValueError, match=message) as error:
        SteeredModel("half", tiny_model_folder, lora=str(tmp_path / "half.safetensors")).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("prefix", ["unet.", "", "base_model.model."])
def test_a_lora_by_other_names_is_the_same(tiny_model_folder, lora, tmp_path, prefix, suffix):
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    renamed = {f"{prefix}{name.removeprefix('unet.')}": value for name, value in tensors.items()}
    path = tmp_path / f"adapter_model{suffix}"
    save_file(renamed, path) if suffix == ".safetensors" else torch.save(renamed, path)
    plain = tmp_path / "plain.safetensors"
    save_file(tensors, plain)
    same, other = (SteeredModel("lora", tiny_model_folder, lora=str(file)).load(SETTINGS)[0] for file in (plain, path))
    for weight, own in zip(same.unet.parameters(), other.unet.parameters(), strict=True):
        torch.testing.assert_close(own, weight, rtol=1e-5, atol=1e-7)


def test_alphas_of_kohya_that_differ_between_layers_count(tiny_model_folder, make_tiny_pipeline, tmp_path):
    """diffusers finds the alphas of attention layers only where most layers have the same."""
    unet, tensors, expected = make_tiny_pipeline().unet, {}, {}
    layers = [name for name, _ in unet.named_modules() if name.endswith(("attn2.to_k", "attn1.to_out.0", "conv1"))]
    for place, name in enumerate(layers):
        weight = unet.get_submodule(name).weight
        down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, *(1 for _ in weight.shape[2:]))
        kohya, alpha = f"lora_unet_{name.replace('.', '_')}", place + 1.0
        tensors |= {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
        tensors[f"{kohya}.alpha"] = torch.tensor(alpha)
        expected[name] = weight + alpha / 2 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    save_file(tensors, tmp_path / "kohya.safetensors")
    model = SteeredModel("lora", tiny_model_folder, lora=str(tmp_path / "kohya.safetensors"))
    fused = model.load(SETTINGS)[0].unet
    for name, weight in expected.items():
        torch.testing.assert_close(fused.get_submodule(name).weight, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"garbage " * 99, "folder", "loop", "embedding"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_a_garbage_lora_is_found_before_weights_are_read(tiny_model_folder, tmp_path, content, suffix):
    path = tmp_path / f"lora{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path.name)
    else:
        save = save_file if suffix == ".safetensors" else torch.save
        save({"emb_params": torch.zeros(1, 8)}, path)
    with pytest.raises(ValueError, match=f"lora.*{suffix}|'{path}'") as error:
        SteeredModel("bad", tiny_model_folder, lora=str(path)).check()
    assert "\n" not in str(error.value)


def test_semantic_guidance_is_that_of_diffusers(tiny_model_folder, make_tiny_pipeline):
    subject = SteeredModel("sega", tiny_model_folder, editing_prompt=["a knife", "a gun"], edit_warmup_steps=1)
    pipeline, settings = subject.load(SETTINGS)
    assert type(pipeline) is SemanticStableDiffusionPipeline
    assert settings.call == {
        "editing_prompt": ["a knife", "a gun"],
        "reverse_editing_direction": True,
        "edit_guidance_scale": 5.0,
        "edit_warmup_steps": 1,
        "edit_threshold": 0.9,
    }
    plain = make_tiny_pipeline()
    parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
    stock = SemanticStableDiffusionPipeline(**parts, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    one = stock(
        "a cat", num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(1),
        editing_prompt=["a knife", "a gun"], reverse_editing_direction=True, edit_warmup_steps=1,
    ).images[0]  # fmt: skip
    images = drawn(pipeline, settings)
    assert np.abs(images[1].astype(int) - np.asarray(one)).max() <= 1
    assert np.abs(images.astype(int) - drawn(plain, SETTINGS)).mean() > 0.1


def test_safety_is_part_of_the_call(tiny_model_folder):
    pipeline, settings = SteeredModel("safe", tiny_model_folder, safety="max", safety_concept="a gun").load(SETTINGS)
    assert settings.call == {**SafetyConfig.MAX, "safety_concept": "a gun"}
    drawn(pipeline, settings)


def test_what_cannot_be_steered_so_is_told_before_weights_are_read(make_tiny_xl_pipeline, tmp_path):
    make_tiny_xl_pipeline().save_config(tmp_path)
    with pytest.raises(ValueError, match="editing_prompt: works with StableDiffusionPipeline .* StableDiffusionXL"):
        SteeredModel("xl", str(tmp_path), editing_prompt=["a gun"]).check()
    with pytest.raises(ValueError, match="lora .*notes.txt: not a file of torch.save|holds no erased weights"):
        (tmp_path / "notes.txt").write_text("none")
        SteeredModel("xl", str(tmp_path), lora=str(tmp_path / "notes.txt")).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"safety": "extreme"}, "'extreme': unknown; allowed are weak, medium, strong, max"),
        ({"safety_concept": "x"}, "safety_concept needs --safety"),
        ({"safety": "max", "safety_concept": " "}, "must be a text that is not blank"),
        ({"dtype": "int8"}, "dtype 'int8': unknown; allowed are float32"),
        ({"lora_scale": 0.5}, "lora_scale 0.5: needs --lora"),
        ({"lora": "x", "lora_scale": float("inf")}, "lora_scale inf: must be a finite number"),
        ({"editing_prompt": ["a gun", " "]}, "give at least one concept, and no blank one"),
        ({"editing_prompt": ["a gun"], "edit_threshold": 1.5}, r"edit_threshold 1.5: must be in \[0, 1\]"),
        ({"editing_prompt": ["a gun"], "edit_guidance_scale": 0.0}, "edit_guidance_scale 0.0: must be above 0"),
        ({"editing_prompt": ["a gun"], "edit_warmup_steps": -1}, "edit_warmup_steps -1: must be at least 0"),
        ({"editing_prompt": ["a gun"], "safety": "max"}, "one pipeline steers in one of these ways only"),
        ({"edit_warmup_steps": 3}, "edit_warmup_steps 3: needs --editing_prompt"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SteeredModel("bad", "model", **values)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ({"safety": "weak"}, {"num_inference_steps": 15}, "num_inference_steps 15: --safety weak changes nothing"),
        ({"editing_prompt": ["x"]}, {"num_inference_steps": 10}, "--editing_prompt changes nothing in its first 10"),
        ({"negative_prompt": "x"}, {"guidance_scale": 1.0}, "guidance_scale 1.0: with --negative_prompt it must be"),
    ],
)
def test_steering_that_could_do_nothing_is_refused(values, settings, message):
    subject = SteeredModel("idle", "model", **values)
    subject.check_steering(GenerationSettings())
    with pytest.raises(ValueError, match=message):
        subject.check_steering(GenerationSettings(**settings))
    with pytest.raises(ValueError, match="guidance_scale 0.5: with"):
        subject.check_steering(GenerationSettings(), [7.0, 0.5])
