"""Files for ComfyUI and A1111. Neither is run here: their rules for names, read from their sources, are written down
anew, and every name that we write must be in them. diffusers reads the files themselves."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    infer_diffusers_model_type,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffusers_safe.families import compvis, family_of_denoiser, family_of_pipeline
from diffusers_safe.formats import full_rank, kohya_tensors, low_rank, read_erased_weights


SD_1 = {"cross_attention_dim": 768}
SD_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module", params=["sd 1", "sd 2", "sdxl"])
def full_size(request):
    """A UNet of full size on the meta device, and its shape in ComfyUI's words."""
    config = {"sd 1": SD_1, "sd 2": SD_2, "sdxl": SDXL}[request.param]
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **config)
    is_xl = request.param == "sdxl"
    return unet, Shape([0, 2, 10], middle=10, adm=True) if is_xl else Shape([1, 1, 1, 0], middle=1, adm=False)


# --- the rules of the other programs ---------------------------------------------------------------------------------


@dataclass
class Shape:
    """A UNet of CompVis: the number of transformer blocks at each level, and in the middle; two resnets a level."""

    depths: list[int]
    middle: int
    adm: bool
    resnets: int = 2


RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}  # fmt: skip
BASIC = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
         "time_embedding.linear_2": "time_embed.2"}  # fmt: skip
BLOCK = [*(f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")), "ff.net.0.proj",
         "ff.net.2"]  # fmt: skip


def unet_pairs(shape):
    """As ComfyUI's `unet_to_diffusers`: diffusers' names and ComfyUI's own, of layers that a LoRA can change."""
    pairs = dict(BASIC)
    if shape.adm:
        pairs |= {f"add_embedding.linear_{number}": f"label_emb.0.{2 * number - 2}" for number in (1, 2)}

    def resnet(name, own):
        pairs.update({f"{name}.{layer}": f"{own}.{other}" for layer, other in RESNET.items()})

    def attention(name, own, depth):
        layers = ["proj_in", "proj_out", *(f"transformer_blocks.{i}.{layer}" for i in range(depth) for layer in BLOCK)]
        pairs.update({f"{name}.{layer}": f"{own}.{layer}" for layer in layers if depth})

    levels = len(shape.depths)
    for level, depth in enumerate(shape.depths):
        first = 1 + level * (shape.resnets + 1)
        for i in range(shape.resnets):
            resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{first + i}.0")
            attention(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{first + i}.1", depth)
        if level < levels - 1:
            pairs[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + shape.resnets}.0.op"
    for i in range(2):
        resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}")
    attention("mid_block.attentions.0", "middle_block.1", shape.middle)
    for level, depth in enumerate(reversed(shape.depths)):
        first = level * (shape.resnets + 1)
        for i in range(shape.resnets + 1):
            resnet(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{first + i}.0")
            attention(f"up_blocks.{level}.attentions.{i}", f"output_blocks.{first + i}.1", depth)
        if level < levels - 1:
            place = 2 if depth else 1
            pairs[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + shape.resnets}.{place}.conv"
    return pairs


def comfyui_unet(shape):
    """As `model_lora_keys_unet`: what may come before `.lora_up.weight`, `.lora_B.weight` and so on -> its layer."""
    accepted = {}
    for diffusers, own in unet_pairs(shape).items():
        accepted[f"lora_unet_{own.replace('.', '_')}"] = own
        accepted[f"lora_unet_{diffusers.replace('.', '_')}"] = own
        old = diffusers.replace(".to_", ".processor.to_")
        old = old[:-2] if old.endswith(".to_out.0") else old
        accepted |= {old: own, f"unet.{old}": own}
    return accepted


def comfyui_sd3(blocks):
    """The same for Stable Diffusion 3, without the layers that the names stand for."""
    layers = ["context_embedder", "pos_embed.proj", "norm_out.linear", "proj_out"]
    layers += [
        f"time_text_embed.{kind}_embedder.linear_{number}" for kind in ("timestep", "text") for number in (1, 2)
    ]
    inside = ["norm1.linear", "norm1_context.linear", "attn.to_add_out", "attn.to_out.0", "attn2.to_out.0"]
    inside += [f"{attention}.to_{part}" for attention in ("attn", "attn2") for part in "qkv"]
    inside += [f"attn.add_{part}_proj" for part in "qkv"]
    inside += [f"{side}.net.{layer}" for side in ("ff", "ff_context") for layer in ("0.proj", "2")]
    layers += [f"transformer_blocks.{block}.{layer}" for block in range(blocks) for layer in inside]
    names = [(f"transformer.{layer}", f"lora_transformer_{layer.replace('.', '_')}") for layer in layers]
    return {name for pair in names for name in pair}


def a1111_unet(name, shape):
    """The layer that A1111 finds for a name: it converts diffusers' names with SD 1.x' numbers, and where that gives
    no layer of the model, takes the name for one of CompVis."""
    layers = {own.replace(".", "_"): own for own in unet_pairs(shape).values()}
    name = name.removeprefix("lora_unet_")
    rules = [
        (r"conv_in", lambda: "input_blocks_0_0"),
        (r"conv_out", lambda: "out_2"),
        (r"time_embedding_linear_(\d)", lambda n: f"time_embed_{2 * n - 2}"),
        (r"down_blocks_(\d)_(attentions|resnets)_(\d)_(.+)",
         lambda level, kind, i, rest: f"input_blocks_{1 + 3 * level + i}_{inside(kind, rest)}"),
        (r"mid_block_attentions_0_(.+)", lambda rest: f"middle_block_1_{rest}"),
        (r"mid_block_resnets_(\d)_(.+)",
         lambda i, rest: f"middle_block_{2 * i}_{inside('resnets', rest).removeprefix('0_')}"),
        (r"up_blocks_(\d)_(attentions|resnets)_(\d)_(.+)",
         lambda level, kind, i, rest: f"output_blocks_{3 * level + i}_{inside(kind, rest)}"),
        (r"down_blocks_(\d)_downsamplers_0_conv", lambda level: f"input_blocks_{3 + 3 * level}_0_op"),
        (r"up_blocks_(\d)_upsamplers_0_conv",
         lambda level: f"output_blocks_{2 + 3 * level}_{2 if level else 1}_conv"),
    ]  # fmt: skip

    def inside(kind, rest):
        return f"1_{rest}" if kind == "attentions" else f"0_{RESNET[rest].replace('.', '_')}"

    for pattern, convert in rules:
        if match := re.fullmatch(pattern, name):
            converted = convert(*(int(part) if part.isdigit() else part for part in match.groups()))
            return layers.get(converted, layers.get(name))
    return layers.get(name)


def changeable(denoiser):
    return [name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_layer_of_a_unet_has_a_name_that_comfyui_and_a1111_know(full_size):
    unet, shape = full_size
    names, accepted, pairs = family_of_denoiser(unet).kohya_layers(unet), comfyui_unet(shape), unet_pairs(shape)
    for layer in changeable(unet):
        assert accepted[names[layer]] == pairs[layer], layer
        assert a1111_unet(names[layer], shape) == pairs[layer], layer


def test_by_pefts_names_comfyui_finds_no_attention_of_a_unet(full_size):
    unet, shape = full_size
    accepted = comfyui_unet(shape)
    missing = [layer for layer in changeable(unet) if f"unet.{layer}" not in accepted]
    assert missing and missing == [layer for layer in changeable(unet) if ".attn" in layer]


def test_of_sdxl_a1111_finds_not_all_layers_by_diffusers_names():
    shape = Shape([0, 2, 10], middle=10, adm=True)
    lost = [layer for layer in unet_pairs(shape) if a1111_unet(f"lora_unet_{layer.replace('.', '_')}", shape) is None]
    assert lost == ["add_embedding.linear_1", "add_embedding.linear_2", "up_blocks.0.upsamplers.0.conv"]


def test_every_layer_of_stable_diffusion_3_has_a_name_that_comfyui_knows(make_tiny_sd3_pipeline):
    transformer = make_tiny_sd3_pipeline().transformer
    assert isinstance(transformer, SD3Transformer2DModel)
    names, accepted = family_of_denoiser(transformer).kohya_layers(transformer), comfyui_sd3(blocks=2)
    for layer in changeable(transformer):
        assert names[layer] in accepted and f"transformer.{layer}" in accepted  # the latter by --to lora


def test_diffusers_reads_each_weight_of_a_unet_by_the_name_we_give_it(full_size):
    unet, shape = full_size
    layers, names = compvis.unet_layers(unet), list(unet.state_dict())
    written = {name: f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in names}
    numbered = {f"model.diffusion_model.{written[name]}": number for number, name in enumerate(names)}
    assert numbered.keys() == compvis.unet_weights(unet).keys()
    assert convert_ldm_unet_checkpoint(numbered, unet.config) == {name: i for i, name in enumerate(names)}
    assert all(layers[layer] == own for layer, own in unet_pairs(shape).items() if layer in layers)


def test_diffusers_reads_each_weight_of_an_autoencoder_by_the_name_we_give_it():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    layers, names = compvis.vae_layers(vae), list(vae.state_dict())
    written = [f"first_stage_model.{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in names]
    assert "first_stage_model.decoder.up.3.block.0.conv1.weight" in written
    assert set(written) == compvis.vae_weights(vae).keys()
    read = convert_ldm_vae_checkpoint({name: torch.tensor(i) for i, name in enumerate(written)}, vae.config)
    assert {name: value.item() for name, value in read.items()} == {name: i for i, name in enumerate(names)}


def test_the_kind_of_a_model_is_recognized_by_its_names(full_size):
    unet, _ = full_size
    config = CLIPTextConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=12, hidden_act="gelu")
    with torch.device("meta"):
        encoder = CLIPTextModelWithProjection(config)
    weights, width = compvis.unet_weights(unet), unet.config.cross_attention_dim
    if width == 2048:
        weights |= compvis.text_weights("text_encoder_2", encoder, "conditioner.embedders.1.")
        assert CHECKPOINT_KEY_NAMES["open_clip_sdxl"] in weights
    assert infer_diffusers_model_type(weights) == {768: "v1", 1024: "v2", 2048: "xl_base"}[width]


def test_what_compvis_does_not_have_is_named(tiny_pipeline):
    asked = {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}
    unet = UNet2DConditionModel.from_config(tiny_pipeline.unet.config, **asked)
    with pytest.raises(ValueError, match="unet encoder_hid_proj.weight: has no place in a checkpoint of one file"):
        compvis.unet_weights(unet)
    weight = unet.encoder_hid_proj.weight.detach()
    lora = low_rank(unet, {"encoder_hid_proj.weight": weight + torch.randn(weight.shape)}, 2)
    with pytest.raises(ValueError, match="encoder_hid_proj: ComfyUI and A1111 know no such layer"):
        kohya_tensors(lora, unet)
    tiny_pipeline.text_encoder.config.hidden_act = "relu"
    with pytest.raises(ValueError, match="text_encoder hidden_act 'relu': .*'quick_gelu' .CLIP. or 'gelu' .OpenCLIP"):
        family_of_pipeline(tiny_pipeline).to_original(tiny_pipeline)


# --- files -----------------------------------------------------------------------------------------------------------


def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a knife", num_inference_steps=2, generator=generator, output_type="np").images


def changed_weights(denoiser):
    """Other weights for every layer that a LoRA can change."""
    generator = torch.Generator().manual_seed(1)
    weights = {f"{name}.weight": denoiser.get_submodule(name).weight.detach() for name in changeable(denoiser)}
    return {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}


@pytest.fixture(params=["sd 1", "sd 2", "sdxl"])
def make(request, make_tiny_pipeline, make_tiny_sd_2_pipeline, make_tiny_xl_pipeline):
    return {"sd 1": make_tiny_pipeline, "sd 2": make_tiny_sd_2_pipeline, "sdxl": make_tiny_xl_pipeline}[request.param]


def write_kohya(path, denoiser, erased, rank=None):
    lora = low_rank(denoiser, erased, rank or full_rank(denoiser, erased))
    save_file({name: value.contiguous() for name, value in kohya_tensors(lora, denoiser).items()}, path)
    return path


@torch.no_grad()
def erase(pipeline, erased):
    for name, value in erased.items():
        pipeline.unet.get_parameter(name).copy_(value)


def test_diffusers_and_we_read_what_we_write_for_comfyui(make, tmp_path):
    """Ranks differ between layers here, from 4 to 16: diffusers would lose alphas that differ, too."""
    base, erased_model = make(), make()
    erased = changed_weights(base.unet)
    erase(erased_model, erased)
    path = write_kohya(tmp_path / "kohya.safetensors", base.unet, erased)
    assert len({value.item() for name, value in load_file(path).items() if name.endswith(".alpha")}) == 1
    expected = images(erased_model)
    ours = make()
    read_erased_weights(path).apply(ours.unet)
    assert np.abs(images(ours) - expected).max() < 1e-4
    before = images(base)
    base.load_lora_weights(path)
    assert np.abs(images(base) - expected).max() < 1e-4 < np.abs(before - expected).max()
    base.fuse_lora()  # there are no biases


def test_we_read_what_we_write_for_comfyui_of_stable_diffusion_3(make_tiny_sd3_pipeline, tmp_path):
    transformer = make_tiny_sd3_pipeline().transformer
    erased = changed_weights(transformer)
    path = write_kohya(tmp_path / "kohya.safetensors", transformer, erased)
    assert all(name.partition(".")[0] in comfyui_sd3(blocks=2) for name in load_file(path))
    read = read_erased_weights(path).values(transformer)
    assert read.keys() == erased.keys()
    assert all(torch.allclose(read[name], erased[name], atol=1e-5) for name in erased)


def test_a_checkpoint_of_one_file_generates_the_same_images(make, tmp_path):
    """`config` is a folder with other weights, of which none are used."""
    pipeline = make()
    erase(pipeline, changed_weights(pipeline.unet))
    weights = family_of_pipeline(pipeline).to_original(pipeline)
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "checkpoint.safetensors")
    make(seed=5).save_pretrained(tmp_path / "config")
    kind = StableDiffusionXLPipeline if hasattr(pipeline, "text_encoder_2") else StableDiffusionPipeline
    options = {"add_watermarker": False} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    read = kind.from_single_file(tmp_path / "checkpoint.safetensors", config=str(tmp_path / "config"), **options)
    assert np.abs(images(read) - images(pipeline)).max() < 1e-4
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (part := getattr(pipeline, name, None)) is not None:
            state, own = getattr(read, name).state_dict(), part.state_dict()
            assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own), name
    ours = read_erased_weights(tmp_path / "checkpoint.safetensors").values(make().unet)
    assert all(torch.equal(value, pipeline.unet.get_parameter(name)) for name, value in ours.items()) and ours


def test_comfyui_is_told_of_v_prediction_in_sdxl(make_tiny_xl_pipeline):
    pipeline = make_tiny_xl_pipeline()
    assert "v_pred" not in family_of_pipeline(pipeline).to_original(pipeline)
    pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert {"v_pred", "ztsnr"} <= family_of_pipeline(pipeline).to_original(pipeline).keys()


def test_a1111_lists_a_lora_by_its_metadata(full_size):
    unet, shape = full_size
    written = family_of_denoiser(unet).kohya_metadata(unet)
    is_xl, is_sd_2 = written.get("ss_base_model_version", "").startswith("sdxl_"), written.get("ss_v2") == "True"
    assert (is_xl, is_sd_2) == (shape.adm, unet.config.cross_attention_dim == 1024)


@pytest.mark.parametrize("by_compvis", [False, True])
def test_ranks_and_alphas_that_differ_between_layers_are_read(make, tmp_path, by_compvis):
    unet = make().unet
    names, tensors, expected = compvis.unet_layers(unet), {}, {}
    generator = torch.Generator().manual_seed(2)
    for rank, layer in enumerate(changeable(unet)[3:9], start=1):
        weight = unet.get_submodule(layer).weight.detach()
        up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        name = f"lora_unet_{(names[layer] if by_compvis else layer).replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2 if rank % 2 else 3.0)
        product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        expected[f"{layer}.weight"] = weight + (0.5 if rank % 2 else 3 / rank) * product
    save_file(tensors, tmp_path / "lora.safetensors")
    read = read_erased_weights(tmp_path / "lora.safetensors").values(unet)
    assert read.keys() == expected.keys()
    assert all(torch.allclose(read[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("layer, message", [
    ("lora_transformer_transformer_blocks_0_attn_to_q", "LoRA is of another kind of model than UNet2DConditionModel"),
    ("lora_unet_double_blocks_0_img_attn_qkv", "LoRA is of another kind of model than UNet2DConditionModel"),
    ("lora_unet_conv_in", r"conv_in.weight has shape \(32, 32\), the denoiser's has"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "changes another component than the denoiser"),
])  # fmt: skip
def test_a_lora_of_another_model_is_one_line(tiny_pipeline, tmp_path, layer, message):
    path = tmp_path / "lora.safetensors"
    save_file({f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(32, 2)}, path)
    with pytest.raises(ValueError, match=message) as refusal:
        read_erased_weights(path).values(tiny_pipeline.unet)
    assert "\n" not in str(refusal.value)
