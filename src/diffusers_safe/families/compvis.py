"""Stable Diffusion 1.x, 2.x and XL by the names of their authors (CompVis, later Stability AI).

Checkpoints of one file have these names, which ComfyUI and A1111 load. Their UNet and autoencoder number blocks in the
order in which they run; diffusers groups them by resolution:

    diffusers                                CompVis
    down_blocks.1.attentions.0.proj_in       input_blocks.4.1.proj_in     0: conv_in, then each resnet and downsampler
    up_blocks.0.upsamplers.0.conv            output_blocks.2.1.conv       where the last attention would be, or next
    decoder.up_blocks.0.resnets.1.conv1      decoder.up.3.block.1.conv1   counted from the image

A text encoder is either CLIP by transformers' names, or OpenCLIP, whose queries, keys and values are one matrix.
"""

import re

import torch
from diffusers import AutoencoderKL, Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import PreTrainedModel


_UNET_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_LAYERS = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"} | {
    f"{side}.{name}": f"{side}.{other}"
    for side in ("encoder", "decoder")
    for name, other in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out"))
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = (
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.token_embedding\.", "token_embedding."),
    (r"final_layer_norm\.", "ln_final."),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"transformer.resblocks.\1.ln_\2."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
)
_QUERY = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)")
# The activation tells the two kinds of text encoders apart; other programs compute each with its own.
_KINDS = {"quick_gelu": "CLIP", "gelu": "OpenCLIP"}


def unet_layers(unet: UNet2DConditionModel) -> dict[str, str]:
    """CompVis' names of a UNet's layers, by diffusers' names; layers that CompVis' UNet does not have are left out."""
    layers = {name: other for name, other in _UNET_LAYERS.items() if _has(unet, name)}
    number = 1
    for level, block in enumerate(unet.down_blocks):
        number = _add_level(layers, f"down_blocks.{level}", block, "input_blocks", number)
        if block.downsamplers:
            layers[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    if unet.mid_block is not None:
        for place, resnet in enumerate(unet.mid_block.resnets):
            _add(layers, f"mid_block.resnets.{place}", resnet, f"middle_block.{2 * place}", _UNET_RESNET)
        for place, attention in _attentions(unet.mid_block):
            _add(layers, f"mid_block.attentions.{place}", attention, f"middle_block.{2 * place + 1}")
    number = 0
    for level, block in enumerate(unet.up_blocks):
        number = _add_level(layers, f"up_blocks.{level}", block, "output_blocks", number)
        if block.upsamplers:
            place = 2 if _attentions(block) else 1
            layers[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    return layers


def vae_layers(vae: AutoencoderKL) -> dict[str, str]:
    """CompVis' names of an autoencoder's layers, by diffusers' names."""
    layers = {name: other for name, other in _VAE_LAYERS.items() if _has(vae, name)}
    for level, block in enumerate(vae.encoder.down_blocks):
        _add_vae_level(layers, f"encoder.down_blocks.{level}", block, f"encoder.down.{level}")
    for level, block in enumerate(vae.decoder.up_blocks):
        _add_vae_level(
            layers, f"decoder.up_blocks.{level}", block, f"decoder.up.{len(vae.decoder.up_blocks) - 1 - level}"
        )
    for side in ("encoder", "decoder"):
        middle = getattr(vae, side).mid_block
        for place, resnet in enumerate(middle.resnets):
            name = f"{side}.mid_block.resnets.{place}"
            _add(layers, name, resnet, f"{side}.mid.block_{place + 1}", _VAE_RESNET)
        for place, attention in enumerate(filter(None, middle.attentions)):
            name = f"{side}.mid_block.attentions.{place}"
            _add(layers, name, attention, f"{side}.mid.attn_{place + 1}", _VAE_ATTENTION)
    return layers


def unet_weights(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """A UNet's weights as a checkpoint has them.

    Raises:
        `ValueError`: If CompVis' UNet lacks one of its layers.
    """
    return _renamed("unet", unet, unet_layers(unet), "model.diffusion_model.")


def vae_weights(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """As [`unet_weights`], of an autoencoder; the linear layers of its attention become convolutions of one pixel."""
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"vae {type(vae).__name__}: a checkpoint of one file holds an AutoencoderKL")
    weights = _renamed("vae", vae, vae_layers(vae), "first_stage_model.")
    return {
        name: value[:, :, None, None] if ".mid.attn_" in name and value.ndim == 2 else value
        for name, value in weights.items()
    }


def text_weights(
    name: str, encoder: PreTrainedModel, place: str, kinds: tuple[str, ...] = tuple(_KINDS.values())
) -> dict[str, torch.Tensor]:
    """As [`unet_weights`], of a text encoder.

    Args:
        name (`str`): Its name in the pipeline, for messages.
        encoder (`PreTrainedModel`): A CLIP text encoder, with or without a projection.
        place (`str`): Where it is in a checkpoint, such as `"cond_stage_model."`.
        kinds (`tuple[str, ...]`): `"CLIP"`, `"OpenCLIP"` or both: what may be at this place.

    Raises:
        `ValueError`: If it is of another kind.
    """
    activation = encoder.config.hidden_act
    if (kind := _KINDS.get(activation)) not in kinds:
        allowed = " or ".join(f"'{act}' ({one})" for act, one in _KINDS.items() if one in kinds)
        raise ValueError(f"{name} hidden_act '{activation}': a checkpoint of one file holds {allowed}")
    # transformers 5.6 and later have the prefix in encoders with a projection only.
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    if kind == "CLIP":
        # Of CLIP, only the states of tokens are used, never the projection.
        prefix = f"{place}transformer.text_model."
        return {f"{prefix}{key}": value for key, value in state.items() if key != "text_projection.weight"}
    return {f"{place}model.{key}": value for key, value in _open_clip(state).items()}


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, value in state.items():
        if match := _QUERY.fullmatch(name):
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            weights[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif name == "text_projection.weight":
            weights["text_projection"] = value.T
        elif ".k_proj." not in name and ".v_proj." not in name:
            pattern, other = next(rule for rule in _OPEN_CLIP if re.match(rule[0], name))
            weights[re.sub(pattern, other, name)] = value
    return weights


def _add_level(layers: dict[str, str], name: str, block: nn.Module, side: str, number: int) -> int:
    """Adds the resnets of a UNet's block and their attentions; returns the next free number."""
    for place, resnet in enumerate(block.resnets):
        _add(layers, f"{name}.resnets.{place}", resnet, f"{side}.{number + place}.0", _UNET_RESNET)
    for place, attention in _attentions(block):
        _add(layers, f"{name}.attentions.{place}", attention, f"{side}.{number + place}.1")
    return number + len(block.resnets)


def _attentions(block: nn.Module) -> list[tuple[int, nn.Module]]:
    """The attentions of a UNet's block that CompVis' UNet can have, with their places."""
    found = enumerate(getattr(block, "attentions", None) or [])
    return [(place, attention) for place, attention in found if isinstance(attention, Transformer2DModel)]


def _add_vae_level(layers: dict[str, str], name: str, block: nn.Module, other: str) -> None:
    for place, resnet in enumerate(block.resnets):
        _add(layers, f"{name}.resnets.{place}", resnet, f"{other}.block.{place}", _VAE_RESNET)
    for change in ("downsample", "upsample"):
        if getattr(block, f"{change}rs", None):
            layers[f"{name}.{change}rs.0.conv"] = f"{other}.{change}.conv"


def _add(
    layers: dict[str, str], name: str, module: nn.Module, other: str, inside: dict[str, str] | None = None
) -> None:
    for layer, _ in module.named_modules():
        if layer:
            layers[f"{name}.{layer}"] = f"{other}.{(inside or {}).get(layer, layer)}"


def _has(module: nn.Module, name: str) -> bool:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module is not None


def _renamed(component: str, model: nn.Module, layers: dict[str, str], place: str) -> dict[str, torch.Tensor]:
    weights = {}
    for name, value in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer not in layers:
            raise ValueError(f"{component} {name}: has no place in a checkpoint of one file")
        weights[f"{place}{layers[layer]}.{kind}"] = value
    return weights
