"""What the families around a `UNet2DConditionModel` share: sizes, encoders, and what training can do with a UNet."""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from transformers import CLIPTextConfig, PreTrainedTokenizerBase

from ..provenance import fingerprint
from .base import ComponentConfig, Conditioning, ModelFamily


UNET_TEXT_WIDTH = 1280  # diffusers' default
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # the first is meant where a config says nothing


class UNetFamily(ModelFamily):
    """A UNet with cross-attention, in the latent space of an autoencoder.

    Attributes:
        text_encoders (`tuple[str, ...]`): Names of the text encoders in the pipeline.
        addition_embed_type (`str`, *optional*): What the UNet must take beside the prompt's hidden states.
    """

    text_encoders: tuple[str, ...]
    addition_embed_type: str | None = None

    @classmethod
    def check(cls, config: ComponentConfig, resolution: int | None = None) -> None:
        for name in ("unet", "vae", "scheduler", *cls.text_encoders):
            if config(name) is None:
                raise ValueError(f"{name}: this pipeline has none (as a refiner has no text_encoder); "
                                 f"{cls.pipeline_classes[0]} needs one to be trained")  # fmt: skip
        unet, vae = config("unet"), config("vae")
        widths = [CLIPTextConfig.from_dict(config(name)).hidden_size for name in cls.text_encoders]
        width = unet.get("cross_attention_dim", UNET_TEXT_WIDTH)
        if unet.get("encoder_hid_dim_type") is None and width != sum(widths):
            raise ValueError(f"unet cross_attention_dim {width}: must be {sum(widths)}, as the text encoders give")
        cls._check_inputs(unet, vae.get("latent_channels", 4))
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
    def _check_inputs(cls, unet: dict[str, Any], latent_channels: int) -> None:
        for name in ("in_channels", "out_channels"):
            if unet[name] != latent_channels:
                raise ValueError(
                    f"unet {name} {unet[name]}: must be {latent_channels}, as latents have; a UNet for inpainting, "
                    "editing or upscaling cannot be trained"
                )
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
                raise ValueError(f"unet {name} {value}: {cls.pipeline_classes[0]} can be trained with "
                                 f"{' or '.join(str(item).lower() for item in allowed)} only")  # fmt: skip

    @classmethod
    def skeleton(cls, config: ComponentConfig) -> nn.Module:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config("unet"))

    @classmethod
    def shape(cls, config: ComponentConfig, resolution: int | None = None) -> tuple[int, int, int]:
        unet = config("unet")
        size = unet["sample_size"] if resolution is None else resolution // vae_scale_factor(config("vae"))
        height, width = (size, size) if isinstance(size, int) else size
        return unet["in_channels"], height, width

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def picture_size(self) -> int:
        _, height, width = self.latent_shape
        if height != width:
            raise ValueError(f"resolution: must be given; this model's own is not square ({height} x {width} latents)")
        return height * vae_scale_factor(self.pipeline.vae.config)

    @torch.no_grad()
    def encode(self, prompts: list[str], device: torch.device | str = "cpu", truncation: bool = False) -> Conditioning:
        if not truncation:
            self.check_prompts(prompts)
        encoders = [getattr(self.pipeline, name) for name in self.text_encoders]
        homes = [encoder.device for encoder in encoders]
        for encoder in encoders:
            encoder.to(device)
        with _silent(type(self.pipeline).__module__) if truncation else nullcontext():
            encoded = self._encode(prompts, device)
        for encoder, home in zip(encoders, homes):
            encoder.to(home)
        return encoded

    def encode_with_gradients(self, prompts: list[str], device: torch.device | str = "cpu") -> Conditioning:
        self.check_prompts(prompts)
        return self._encode(prompts, device)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {name: getattr(self.pipeline, name) for name in ("vae", *self.text_encoders)}

    @property
    def encoding_identity(self) -> dict[str, str]:
        tokenizers = {name: _tokenizer_fingerprint(getattr(self.pipeline, name)) for name in self.tokenizers}
        return {**{name: fingerprint(encoder) for name, encoder in self.encoders.items()}, **tokenizers}

    @torch.no_grad()
    def encode_pictures(self, pixel_values: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        vae = self.pipeline.vae
        home = vae.device
        vae.to(device)
        moments = vae.encode(pixel_values.to(device, vae.dtype)).latent_dist.parameters
        vae.to(home)
        return moments

    def draw_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        latents = DiagonalGaussianDistribution(moments.float()).sample(generators)
        vae = self.pipeline.vae.config
        mean, std = vae.get("latents_mean"), vae.get("latents_std")
        if mean is not None and std is not None:  # as SDXL's pipelines read them
            mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
            return (latents - mean) * vae.scaling_factor / std
        return latents * vae.scaling_factor

    @abstractmethod
    def _encode(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        """Encodes prompts that fit, with encoders that are on the device."""


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": tokenizer.pad_token, "truncation": tokenizer.model_max_length}  # else the last call's
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def _check_scheduler(scheduler: dict[str, Any]) -> None:
    name, predicted = scheduler["_class_name"], scheduler.get("prediction_type", PREDICTION_TYPES[0])
    if name.startswith("Flow") or scheduler.get("use_flow_sigmas"):
        raise ValueError(
            f"scheduler {name}: is for flow matching, whose latents and predictions are not this model family's; "
            "allowed are schedulers of diffusion, such as DDIMScheduler"
        )
    if predicted not in PREDICTION_TYPES:
        raise ValueError(f"scheduler {name} prediction_type '{predicted}': allowed are {', '.join(PREDICTION_TYPES)}")


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without warnings from this logger: diffusers has one for every prompt that is cut."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def vae_scale_factor(vae: dict[str, Any]) -> int:
    """Pixels a latent's pixel stands for, in each direction; as diffusers' pipelines compute it."""
    return 2 ** (len(vae["block_out_channels"]) - 1)
