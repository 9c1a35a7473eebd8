"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, epsilon or v prediction."""

import torch
from torch import nn

from .base import Backbone, Conditioning


class StableDiffusionBackbone(Backbone):
    """SD 1.x and 2.x, and every pipeline of their shape."""

    pipeline_classes = ("StableDiffusionPipeline",)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @torch.no_grad()
    def encode(self, prompts: list[str], device: torch.device | str = "cpu") -> Conditioning:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        for prompt in prompts:
            count = len(tokenizer(prompt).input_ids)
            if count > tokenizer.model_max_length:
                raise ValueError(
                    f"prompt '{prompt[:60]}...' has {count} tokens; this model takes {tokenizer.model_max_length}, "
                    "and what is cut would not be trained. Concepts are not joined with --prompt_order matched and "
                    "no --negative_guidance_scale"
                )
        home = encoder.device
        encoder.to(device)
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        encoder.to(home)
        return {"encoder_hidden_states": prompt_embeds}

    def predict(
        self, denoiser: nn.Module, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return denoiser(model_input, timesteps, return_dict=False, **conditioning)[0]
