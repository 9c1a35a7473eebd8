"""Stable Diffusion XL: two CLIP text encoders, the pooled states of the second, and the image's size as time ids."""

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTextConfig

from .base import ComponentConfig, Conditioning, vae_scale_factor
from .registry import register_family
from .unet import UNetFamily


NUM_TIME_IDS = 6  # original height and width, crop's top and left, target height and width


@register_family
class StableDiffusionXLFamily(UNetFamily):
    """SDXL and every pipeline of its shape (Podell et al., arXiv 2307.01952).

    A `Conditioning` holds `encoder_hidden_states`, `(B, length, width)`, and what the UNet takes as
    `added_cond_kwargs`: `text_embeds`, `(B, projection_dim)`, and `time_ids`, `(B, 6)`: an image of the resolution
    that is trained, not cropped, as the pipeline itself asks for.

    `""` is what the pipeline guides away from without a negative prompt: zeros where its config says
    `force_zeros_for_empty_prompt`, as SDXL's does. An encoded `""` is another prompt, which such a model never learned
    as its unconditional one.
    """

    pipeline_classes = (StableDiffusionXLPipeline,)
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    token_names = ("clip_l", "clip_g")
    addition_embed_type = "text_time"
    text_places = (("conditioner.embedders.0.", ("CLIP",)), ("conditioner.embedders.1.", ("OpenCLIP",)))

    @classmethod
    def check(cls, config: ComponentConfig, resolution: int | None = None) -> None:
        super().check(config, resolution)
        unet = config("unet")
        text = CLIPTextConfig.from_dict(config("text_encoder_2")).projection_dim
        times, width = unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
        if text + NUM_TIME_IDS * times != width:
            raise ValueError(
                f"unet projection_class_embeddings_input_dim {width}: must be {text + NUM_TIME_IDS * times}, for "
                f"{text} of text and {NUM_TIME_IDS} time ids of {times}; a refiner, which takes an aesthetics score, "
                "cannot be trained"
            )

    @classmethod
    def to_original(cls, pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
        weights, scheduler = super().to_original(pipeline), pipeline.scheduler.config
        if scheduler.get("prediction_type") == "v_prediction":
            # ComfyUI looks for tensors of these names.
            weights["v_pred"] = torch.empty(0)
            if scheduler.get("rescale_betas_zero_snr"):
                weights["ztsnr"] = torch.empty(0)
        return weights

    def _encode(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        encoder_hidden_states, pooled = self.encode_different(prompts, lambda batch: self._encode_some(batch, device))
        _, *latent_size = self.latent_shape
        height, width = (size * vae_scale_factor(self.pipeline.vae.config) for size in latent_size)
        time_ids = torch.tensor([height, width, 0, 0, height, width]).to(encoder_hidden_states)
        return {
            "encoder_hidden_states": encoder_hidden_states,
            "text_embeds": pooled,
            "time_ids": time_ids.repeat(len(prompts), 1),
        }

    def _encode_some(self, prompts: list[str], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self.pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        hidden_states, pooled = encoded[0], encoded[2]
        if "" not in prompts:
            return hidden_states, pooled
        # The negative embeddings of a call without negative prompt: zeros, if the pipeline is set so.
        _, nothing, _, nothing_pooled = self.pipeline.encode_prompt(
            "", device=device, do_classifier_free_guidance=True
        )
        is_empty = torch.tensor([not prompt for prompt in prompts], device=hidden_states.device)
        return (
            torch.where(is_empty[:, None, None], nothing, hidden_states),
            torch.where(is_empty[:, None], nothing_pooled, pooled),
        )

    @property
    def encoding_identity(self) -> dict[str, str]:
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        return {**super().encoding_identity, "force_zeros_for_empty_prompt": str(zeros)}

    def with_sizes(
        self, conditioning: Conditioning, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor
    ) -> Conditioning:
        target_sizes = conditioning["time_ids"][:, 4:]
        sizes = (original_sizes.to(target_sizes), crop_top_lefts.to(target_sizes), target_sizes)
        return {**conditioning, "time_ids": torch.cat(sizes, dim=1)}

    def predict(
        self, denoiser: nn.Module, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        added = dict(conditioning)
        hidden_states = added.pop("encoder_hidden_states")
        return denoiser(model_input, timesteps, hidden_states, added_cond_kwargs=added, return_dict=False)[0]
