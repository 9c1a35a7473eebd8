"""What the families around a `UNet2DConditionModel` share: checks, parameters, inputs, and names in files."""

import re
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import nn
from transformers import CLIPTextConfig

from . import compvis
from .base import ComponentConfig, ModelFamily, Rule, check_channels, vae_scale_factor


UNET_TEXT_WIDTH = 1280  # diffusers' default
SD_2_TEXT_WIDTH = 1024
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # the first is meant where a config says nothing
# Where SD 1.x and 2.x attend outside the middle: on three of four levels, one transformer block a place.
_SD_BLOCKS = {
    f"{side}_blocks.{level}.attentions.{place}.transformer_blocks.0"
    for side, levels, places in (("down", (0, 1, 2), 2), ("up", (1, 2, 3), 3))
    for level in levels
    for place in range(places)
}


def _is_time_or_output(name: str) -> bool:
    return name.startswith(("time_embedding.", "conv_out.", "conv_norm_out."))


def _inside(name: str, attention: str, blocks: tuple[str, ...]) -> bool:
    return f".{attention}." in name and name.startswith(blocks)


class UNetFamily(ModelFamily):
    """A UNet with cross-attention, in the latent space of an autoencoder.

    Attributes:
        addition_embed_type (`str`, *optional*): What the UNet must take besides the prompt's hidden states.
        by_number (`tuple[str, ...]`): Train methods that name blocks by their numbers in Stable Diffusion 1.x and 2.x,
            which are other blocks in other UNets.
        text_places (`tuple[tuple[str, tuple[str, ...]], ...]`): For each text encoder its place in a checkpoint of one
            file, and which kinds may be there, as of [`compvis.text_weights`].
    """

    denoiser_name = "unet"
    denoiser_class = UNet2DConditionModel
    denoiser_parts = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "conv_norm_out",
                      "time_embedding", "add_embedding", "encoder_hid_proj")  # fmt: skip
    kohya_prefix = "lora_unet_"
    single_file = True
    text_places: tuple[tuple[str, tuple[str, ...]], ...] = (("cond_stage_model.", ("CLIP", "OpenCLIP")),)
    pooled_name = "text_embeds"
    train_methods: dict[str, Rule] = {
        "xattn": lambda name, _: "attn2" in name,
        "xattn-strict": lambda name, _: "attn2.to_k" in name or "attn2.to_v" in name,
        "noxattn": lambda name, _: "attn2" not in name and not _is_time_or_output(name),
        "selfattn": lambda name, _: "attn1" in name,
        "full": lambda name, _: True,
        "notime": lambda name, _: not _is_time_or_output(name),
        "esd-u": lambda name, module: isinstance(module, (nn.Linear, nn.Conv2d)) and "attn2" not in name,
        "xlayer": lambda name, _: _inside(name, "attn2", ("up_blocks.2.attentions.0.", "up_blocks.2.attentions.2.")),
        "selflayer": lambda name, _: _inside(
            name, "attn1", ("down_blocks.1.attentions.0.", "down_blocks.2.attentions.0.")
        ),
    }
    by_number = ("xlayer", "selflayer")
    addition_embed_type: str | None = None

    @classmethod
    def check(cls, config: ComponentConfig, resolution: int | None = None) -> None:
        for name in ("unet", "vae", "scheduler", *cls.text_encoders):
            if config(name) is None:
                raise ValueError(f"{name}: this pipeline has none (as a refiner has no text_encoder); "
                                 f"{cls.pipeline_classes[0].__name__} needs one to be trained")  # fmt: skip
        unet, vae = config("unet"), config("vae")
        widths = [CLIPTextConfig.from_dict(config(name)).hidden_size for name in cls.text_encoders]
        width = unet.get("cross_attention_dim", UNET_TEXT_WIDTH)
        if unet.get("encoder_hid_dim_type") is None and width != sum(widths):
            raise ValueError(f"unet cross_attention_dim {width}: must be {sum(widths)}, as the text encoders give")
        check_channels("unet", unet, vae, "a UNet for inpainting, editing or upscaling")
        cls._check_inputs(unet)
        _check_scheduler(config("scheduler"))
        scale = vae_scale_factor(vae)
        if resolution is not None and (resolution < scale or resolution % scale):
            below = max(resolution // scale, 1) * scale
            raise ValueError(
                f"resolution {resolution}: must be a multiple of {scale}, by which this model's autoencoder divides "
                f"it, such as {below} or {below + scale}"
            )
        if resolution is None and unet.get("sample_size") is None:
            raise ValueError("resolution: this model's UNet does not say its own (no sample_size); it must be given")

    @classmethod
    def _check_inputs(cls, unet: dict[str, Any]) -> None:
        if (dim := unet.get("time_cond_proj_dim")) is not None:
            raise ValueError(
                f"unet time_cond_proj_dim {dim}: must be none; this model takes its guidance scale as an input, as "
                "latent consistency models do, and has no unconditional prediction; erase from the model it was "
                "distilled from"
            )
        for name, allowed in {
            "addition_embed_type": (cls.addition_embed_type,),
            "encoder_hid_dim_type": (None, "text_proj"),
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
        }.items():
            if (value := unet.get(name)) not in allowed:
                raise ValueError(f"unet {name} {value}: {cls.pipeline_classes[0].__name__} can be trained with "
                                 f"{' or '.join(str(item).lower() for item in allowed)} only")  # fmt: skip

    @classmethod
    def check_components(cls, config: ComponentConfig) -> None:
        unet = config("unet")
        size = unet.get("sample_size")
        sizes = size if isinstance(size, list) and len(size) == 2 else [size]
        if size is not None and not all(isinstance(side, int) and side > 0 for side in sizes):
            raise ValueError(f"unet sample_size {size!r}: must be a whole number above 0, or a pair of them")
        encoders = [found for name in ("text_encoder", "text_encoder_2") if (found := config(name)) is not None]
        if not encoders or any(not found["_class_name"].startswith("CLIPText") for found in encoders):
            return
        width, widths = unet.get("cross_attention_dim"), [CLIPTextConfig.from_dict(x).hidden_size for x in encoders]
        if isinstance(width, int) and unet.get("encoder_hid_dim_type") is None and width != sum(widths):
            given = " + ".join(map(str, widths))
            raise ValueError(f"unet cross_attention_dim {width}: the text encoders give {given}")

    @classmethod
    def shape(cls, config: ComponentConfig, resolution: int | None = None) -> tuple[int, int, int]:
        unet = config("unet")
        size = unet["sample_size"] if resolution is None else resolution // vae_scale_factor(config("vae"))
        height, width = (size, size) if isinstance(size, int) else size
        return unet["in_channels"], height, width

    @classmethod
    def blank_inputs(cls, denoiser: nn.Module, shape: tuple[int, int, int, int], tokens: int) -> dict[str, Any]:
        config, batch_size = denoiser.config, shape[0]
        widths = config.cross_attention_dim
        width = widths if isinstance(widths, int) else widths[0]
        inputs = {
            "sample": torch.empty(shape, device="meta"),
            "timestep": torch.empty(batch_size, dtype=torch.long, device="meta"),
            "encoder_hidden_states": torch.empty(batch_size, tokens, width, device="meta"),
        }
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.empty(batch_size, pooled, device="meta"),
                "time_ids": torch.empty(batch_size, 6, device="meta"),
            }
        return inputs

    @classmethod
    def rules(cls, denoiser: nn.Module) -> dict[str, Rule]:
        blocks = r"(down|up)_blocks.*\.transformer_blocks\.\d+$"
        numbered_as_sd = _SD_BLOCKS == {name for name, _ in denoiser.named_modules() if re.match(blocks, name)}
        return {name: rule for name, rule in cls.train_methods.items() if numbered_as_sd or name not in cls.by_number}

    @classmethod
    def text_projections(cls, denoiser: nn.Module) -> list[str]:
        # Where the UNet projects the states first, keys and values read the projection.
        return ["encoder_hid_proj.weight"] if denoiser.encoder_hid_proj else super().text_projections(denoiser)

    @classmethod
    def pooled_projection(cls, denoiser: nn.Module) -> str | None:
        return "add_embedding.linear_1.weight" if cls.takes_pooled(denoiser.config) else None

    @classmethod
    def from_original(cls, weights: dict[str, torch.Tensor], denoiser: nn.Module) -> dict[str, torch.Tensor]:
        return convert_ldm_unet_checkpoint(weights, denoiser.config)

    @classmethod
    def to_original(cls, pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
        weights = {**compvis.unet_weights(pipeline.unet), **compvis.vae_weights(pipeline.vae)}
        for name, (place, kinds) in zip(cls.text_encoders, cls.text_places, strict=True):
            weights |= compvis.text_weights(name, getattr(pipeline, name), place, kinds)
        return weights

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, str]:
        return compvis.unet_layers(denoiser)

    @classmethod
    def kohya_layers(cls, denoiser: nn.Module) -> dict[str, str]:
        # ComfyUI knows both names of each layer. Of SDXL, A1111 and diffusers read all layers by CompVis' names only;
        # of the others diffusers reads its own only.
        original = compvis.unet_layers(denoiser)
        by_original = cls.takes_pooled(denoiser.config)
        return {name: cls.kohya_name(other if by_original else name) for name, other in original.items()}

    @classmethod
    def kohya_metadata(cls, denoiser: nn.Module) -> dict[str, str]:
        # Without, A1111 takes any LoRA with metadata for one of SD 1.x, and does not list it for other models.
        if cls.takes_pooled(denoiser.config):
            return {"ss_base_model_version": "sdxl_base_v1-0"}
        is_sd_2 = denoiser.config.cross_attention_dim == SD_2_TEXT_WIDTH
        return {"ss_v2": "True"} if is_sd_2 else {"ss_base_model_version": "sd_v1"}

    @classmethod
    def rename_lora(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return convert_unet_state_dict_to_peft(tensors)

    @classmethod
    def takes_pooled(cls, config: dict[str, Any]) -> bool:
        return config.get("addition_embed_type") == "text_time"


def _check_scheduler(scheduler: dict[str, Any]) -> None:
    name, predicted = scheduler["_class_name"], scheduler.get("prediction_type", PREDICTION_TYPES[0])
    if name.startswith("Flow") or scheduler.get("use_flow_sigmas"):
        raise ValueError(
            f"scheduler {name}: is for flow matching, whose latents and predictions are not this model family's; "
            "allowed are schedulers of diffusion, such as DDIMScheduler"
        )
    if predicted not in PREDICTION_TYPES:
        raise ValueError(f"scheduler {name} prediction_type '{predicted}': allowed are {', '.join(PREDICTION_TYPES)}")
