"""Stable Diffusion XL with Safe Latent Diffusion."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from .output import StableDiffusionSafePipelineOutput
from .repository import SafePipelineMixin, with_safety_concept


@with_safety_concept
class StableDiffusionXLPipelineSafe(SafePipelineMixin, StableDiffusionXLPipeline):
    """[`~diffusers.StableDiffusionXLPipeline`] with Safe Latent Diffusion, see [`StableDiffusionPipelineSafe`].

    SLD's presets were found for Stable Diffusion 1.x; the paper does not measure them on SDXL.
    """

    _card_tags = ("text-to-image", "stable-diffusion-xl")

    def encode_prompt(
        self,
        prompt: str,
        prompt_2: str | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | None = None,
        negative_prompt_2: str | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ):
        """As in [`~diffusers.StableDiffusionXLPipeline`]. The embeddings carry those of the safety concept along, for
        a pipeline without text encoders."""
        prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds = (
            super().encode_prompt(
                prompt,
                prompt_2,
                device,
                num_images_per_prompt,
                do_classifier_free_guidance,
                negative_prompt,
                negative_prompt_2,
                prompt_embeds,
                negative_prompt_embeds,
                pooled_prompt_embeds,
                negative_pooled_prompt_embeds,
                lora_scale,
                clip_skip,
            )
        )
        self._carry_concept(prompt_embeds, device, lora_scale, clip_skip)
        return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        sld_guidance_scale: float = 1000,
        sld_warmup_steps: int = 10,
        sld_threshold: float = 0.01,
        sld_momentum_scale: float = 0.3,
        sld_mom_beta: float = 0.4,
        safety_concept: str | None = None,
        safety_prompt_embeds: torch.Tensor | None = None,
        safety_pooled_prompt_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> StableDiffusionSafePipelineOutput | tuple:
        """Generates images away from the safety concept: the parent's arguments, and those of
        [`StableDiffusionPipelineSafe`]; `safety_prompt_embeds` need `safety_pooled_prompt_embeds`, `(1, width)`."""
        arguments = locals()
        (images,), applied = self._call_with_concept(super().__call__, {**arguments, "return_dict": False})
        output = StableDiffusionSafePipelineOutput(images, None, applied, None)
        return output if return_dict else (images, None, applied, None)
