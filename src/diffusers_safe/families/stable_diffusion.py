"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, epsilon or v prediction."""

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from .base import Conditioning
from .registry import register_family
from .unet import UNetFamily


@register_family
class StableDiffusionFamily(UNetFamily):
    """SD 1.x and 2.x, and every pipeline of their shape."""

    pipeline_classes = (StableDiffusionPipeline,)
    text_encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)

    def _encode(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": prompt_embeds}

    def predict(
        self, denoiser: nn.Module, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return denoiser(model_input, timesteps, return_dict=False, **conditioning)[0]
