"""Adapters as the trained weights, and the file that stock pipelines take."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from torch import nn

from closeness import ROUNDING, difference
from diffusers_safe.families.unet import UNetFamily
from diffusers_safe.formats import LORA_NAME, save_lora
from diffusers_safe.provenance import Provenance, fingerprint
from diffusers_safe.weights.lora import LoRAWeights, adapted_layers, fused
from diffusers_safe.weights.trained import select_parameters


INPUTS = (torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700]))
STATES = torch.randn((2, 32, 32), generator=torch.Generator().manual_seed(1))


def predict(unet, **conditions):
    return unet(*INPUTS, STATES, **conditions).sample


def adapt(unet, train_method="xattn", rank=3, **options):
    return LoRAWeights(unet, select_parameters(unet, train_method), rank=rank, **options)


@torch.no_grad()
def move(weights, seed=0, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    for parameter in weights.student.values():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a knife", num_inference_steps=3, generator=generator, output_type="np").images


def close(first, second):
    return np.allclose(first, second, atol=1e-4)


# --- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_method", UNetFamily.train_methods)
def test_the_selected_linear_and_convolution_layers_are_adapted_and_no_others(tiny_pipeline, train_method):
    unet = tiny_pipeline.unet
    modules, names = dict(unet.named_modules()), select_parameters(unet, train_method)
    owners = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    weights = adapt(unet, train_method)
    assert set(adapted_layers(unet)) == {name for name in owners if isinstance(modules[name], (nn.Linear, nn.Conv2d))}
    assert set(weights.frozen) == {f"{name}.weight" for name in adapted_layers(unet)}
    assert {name for name, value in unet.named_parameters() if value.requires_grad} == set(weights.student)
    assert all(".lora_A." in name or ".lora_B." in name for name in weights.student)


@pytest.mark.parametrize("train_method", ["xattn", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_student_is_the_base_bit_for_bit(tiny_pipeline, train_method, dtype):
    unet = tiny_pipeline.unet.to(dtype)
    inputs = (INPUTS[0].to(dtype), INPUTS[1], STATES.to(dtype))
    with torch.no_grad():
        base = unet(*inputs).sample
        weights = adapt(unet, train_method, ema_decay=0.5)
        assert torch.equal(unet(*inputs).sample, base)
        with weights.use("ema"):
            assert torch.equal(unet(*inputs).sample, base)
    assert all(value.dtype == torch.float32 for value in weights.student.values())


def test_gradients_reach_both_matrices_of_every_adapter_and_nothing_else(tiny_pipeline):
    unet = tiny_pipeline.unet
    weights = adapt(unet, "full")
    move(weights)
    inputs = (torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(2)), 300, STATES[:1])
    student = unet(*inputs).sample
    with torch.no_grad(), weights.use("frozen"):  # a teacher between the student's forward and its backward
        teacher = unet(*inputs).sample
    (student - teacher).square().mean().backward()
    assert {name for name, value in unet.named_parameters() if value.grad is not None} == set(weights.student)
    assert all(value.grad.abs().max() > 0 for value in weights.student.values())


def test_the_teacher_is_the_base_while_the_student_is_adapted(tiny_pipeline):
    unet = tiny_pipeline.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with torch.no_grad():
        base = predict(unet)
        weights = adapt(unet, "full", ema_decay=0.5)
        move(weights)
        weights.update_ema()
        student = predict(unet)
        predictions = {}
        for which in ("frozen", "ema", "student"):
            with weights.use(which):
                predictions[which] = predict(unet)
        with pytest.raises(RuntimeError, match="'frozen' are in use"), weights.use("frozen"), weights.use("ema"):
            pass
        with pytest.raises(KeyError), weights.use("frozen"):
            raise KeyError
        assert difference(predict(unet), student) < ROUNDING
    assert difference(predictions["frozen"], base) < ROUNDING
    assert difference(predictions["student"], student) < ROUNDING
    assert min(difference(predictions["ema"], other) for other in (base, student)) > 10 * ROUNDING
    state = {name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert all(value.requires_grad for value in weights.student.values())


def test_autocast_does_not_answer_with_another_models_weights(tiny_pipeline):
    unet = tiny_pipeline.unet
    weights = adapt(unet, ema_decay=0.0)
    move(weights)
    weights.update_ema()
    move(weights, seed=1)

    def predictions(order):
        seen = {}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for which in order:
                with weights.use(which):
                    seen[which] = predict(unet)
        return seen

    first, second = predictions(("student", "frozen", "ema")), predictions(("ema", "frozen", "student"))
    assert all(torch.equal(first[which], second[which]) for which in first)
    assert not torch.equal(first["student"], first["ema"]) and not torch.equal(first["student"], first["frozen"])


def test_the_start_follows_from_the_seed_alone(make_tiny_pipeline):
    starts = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        starts.append(adapt(make_tiny_pipeline().unet, "full", seed=seed).student)
    first, second, other = starts
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)
    assert all((value == 0).all() == (".lora_B." in name) for name, value in first.items())


def test_state_is_of_the_adapters_and_restores_them(make_tiny_pipeline):
    source, target = (adapt(make_tiny_pipeline().unet, ema_decay=0.5, seed=seed) for seed in (0, 1))
    move(source)
    source.update_ema()
    state = source.state_dict()
    assert state.keys() == {"student", "ema"} and all(".lora_" in name for name in state["ema"])
    target.load_state_dict(state)
    for which in ("student", "ema"):
        assert all(torch.equal(value, source.values(which)[name]) for name, value in target.values(which).items())


def test_what_cannot_be_adapted_is_refused(tiny_pipeline):
    unet = tiny_pipeline.unet
    with pytest.raises(ValueError, match="rank 3: .*no linear or convolution layer.*conv_norm_out.weight"):
        LoRAWeights(unet, ["conv_norm_out.weight", "conv_out.bias"], rank=3)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match="adapters already .style."):
        adapt(unet)


# --- what is saved ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(request, make_tiny_pipeline, tmp_path):
    """A pipeline with an erasure trained into its adapters, and the folder of its LoRA."""
    pipeline = make_tiny_pipeline()
    provenance = Provenance("base", fingerprint(pipeline.unet), ["Van Gogh"], "sdd", "xattn", {}, "v1")
    move(adapt(pipeline.unet, getattr(request, "param", "xattn"), alpha=1.5))
    save_lora(pipeline, provenance, tmp_path / LORA_NAME)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_NAME]
    return pipeline, tmp_path


@pytest.mark.parametrize("saved", ["xattn", "noxattn", "esd-u", "full"], indirect=True)
def test_a_stock_pipeline_loads_fuses_and_unloads_it(saved, tiny_pipeline):
    pipeline, folder = saved
    expected, base = draw(pipeline), draw(tiny_pipeline)
    tiny_pipeline.load_lora_weights(folder, adapter_name="erased")
    assert tiny_pipeline.unet.peft_config["erased"].lora_alpha == 1.5
    assert close(draw(tiny_pipeline), expected) and not close(expected, base)
    tiny_pipeline.fuse_lora()
    tiny_pipeline.unload_lora_weights()
    assert close(draw(tiny_pipeline), expected)


@torch.no_grad()
def test_it_is_weighted_and_combined_with_others(saved, tiny_pipeline, make_tiny_pipeline, tmp_path):
    pipeline, folder = saved
    style = make_tiny_pipeline()
    move(adapt(style.unet, "selfattn", rank=2), seed=5)
    (tmp_path / "style").mkdir()
    save_lora(style, Provenance("base", "", ["x"], "sdd", "selfattn", {}), tmp_path / "style" / LORA_NAME)

    def expected(erased, styled):
        """The base with scaled differences added to its weights."""
        result = make_tiny_pipeline()
        parameters = dict(result.unet.named_parameters())
        for scale, source in ((erased, pipeline), (styled, style)):
            for name, layer in adapted_layers(source.unet).items():
                parameters[f"{name}.weight"] += scale * layer.get_delta_weight("erasure")
        return draw(result)

    tiny_pipeline.load_lora_weights(folder, adapter_name="erased")
    tiny_pipeline.set_adapters("erased", 0.5)
    assert close(draw(tiny_pipeline), expected(0.5, 0)) and not close(expected(0.5, 0), expected(1, 0))
    tiny_pipeline.load_lora_weights(tmp_path / "style", adapter_name="style")
    tiny_pipeline.set_adapters(["erased", "style"], [1.0, 0.7])
    assert close(draw(tiny_pipeline), expected(1, 0.7)) and not close(expected(1, 0.7), expected(1, 0))


def test_the_file_tells_where_it_comes_from(saved, make_tiny_pipeline):
    _, folder = saved
    with safe_open(folder / LORA_NAME, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["base_fingerprint"] == fingerprint(make_tiny_pipeline().unet)
    told = [metadata[name] for name in ("base_model", "base_revision", "method", "train_method", "concepts")]
    assert told == ["base", "v1", "sdd", "xattn", '["Van Gogh"]']
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (3, 1.5)


@pytest.mark.parametrize("saved", ["xattn", "full"], indirect=True)
def test_fused_is_a_plain_pipeline_and_the_adapted_one_stays(saved, tiny_pipeline, tmp_path):
    pipeline, _ = saved
    expected = draw(pipeline)
    changed = {f"{name}.weight" for name in adapted_layers(pipeline.unet)}
    fused(pipeline).save_pretrained(tmp_path / "full")
    tiny_pipeline.save_pretrained(tmp_path / "base")
    for name in ("model_index.json", "unet/config.json"):
        assert (tmp_path / "full" / name).read_text() == (tmp_path / "base" / name).read_text()
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "full")
    assert close(draw(loaded), expected)
    base, plain = tiny_pipeline.unet.state_dict(), loaded.unet.state_dict()
    assert base.keys() == plain.keys()
    assert {name for name in base if not torch.equal(base[name], plain[name])} == changed
    assert close(draw(pipeline), expected) and len(adapted_layers(pipeline.unet)) == len(changed)


@torch.no_grad()
def test_stable_diffusion_xl(tmp_path):
    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(2, 4),
                cross_attention_dim=32,
                norm_num_groups=4,
                use_linear_projection=True,
                transformer_layers_per_block=(1, 2),
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=80,
            )
        return StableDiffusionXLPipeline(None, None, None, None, None, unet, None)

    def draw_xl(pipeline):
        return predict(
            pipeline.unet, added_cond_kwargs={"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
        )

    pipeline, stock = build(), build()
    base = draw_xl(pipeline)
    weights = adapt(pipeline.unet, "full", alpha=1.5)
    assert difference(draw_xl(pipeline), base) < ROUNDING
    move(weights)
    erased = draw_xl(pipeline)
    with weights.use("frozen"):
        assert difference(draw_xl(pipeline), base) < ROUNDING
    save_lora(pipeline, Provenance("xl", "", ["x"], "sdd", "full", {}), tmp_path / LORA_NAME)
    stock.load_lora_weights(tmp_path)
    assert close(draw_xl(stock), erased) and close(draw_xl(fused(pipeline)), erased) and not close(base, erased)
