"""Stable Diffusion 1.x and 2.x with Safe Latent Diffusion: text to image, image to image, inpainting."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from .output import StableDiffusionSafePipelineOutput
from .repository import SafePipelineMixin, with_safety_concept


class _SafeStableDiffusion(SafePipelineMixin):
    """What the three have in common."""

    def encode_prompt(
        self,
        prompt,
        device,
        num_images_per_prompt,
        do_classifier_free_guidance,
        negative_prompt=None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ):
        """As in [`~diffusers.StableDiffusionPipeline`]. The embeddings carry those of the safety concept along, for a
        pipeline without a text encoder."""
        prompt_embeds, negative_prompt_embeds = super().encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            lora_scale,
            clip_skip,
        )
        self._carry_concept(prompt_embeds, device, lora_scale, clip_skip)
        return prompt_embeds, negative_prompt_embeds

    def run_safety_checker(self, image, device, dtype):
        as_drawn = copy.deepcopy(image) if self.safety_checker is not None else None
        image, has_nsfw_concept = super().run_safety_checker(image, device, dtype)
        if has_nsfw_concept is not None and any(has_nsfw_concept):
            self._flagged_images = as_drawn[[i for i, flagged in enumerate(has_nsfw_concept) if flagged]]
        return image, has_nsfw_concept

    def _generate(self, call: Callable, arguments: dict[str, Any]) -> StableDiffusionSafePipelineOutput | tuple:
        return_dict, output_type = arguments["return_dict"], arguments["output_type"]
        self._flagged_images = None
        (images, has_nsfw_concept), applied = self._call_with_concept(call, {**arguments, "return_dict": False})
        unsafe, self._flagged_images = self._flagged_images, None
        if unsafe is not None:
            unsafe = self.image_processor.postprocess(unsafe, output_type=output_type)
        output = StableDiffusionSafePipelineOutput(images, has_nsfw_concept, applied, unsafe)
        return output if return_dict else (images, has_nsfw_concept, applied, unsafe)


@with_safety_concept
class StableDiffusionPipelineSafe(_SafeStableDiffusion, StableDiffusionPipeline):
    """[`~diffusers.StableDiffusionPipeline`] with Safe Latent Diffusion (arXiv 2211.05105).

    Same name and `sld_*` arguments as the pipeline that diffusers had; repositories made with that one load.

    ```python
    # The paper's configuration Max. Not run here.
    pipeline = StableDiffusionPipelineSafe.from_pretrained("CompVis/stable-diffusion-v1-4")
    image = pipeline("a portrait", **SafetyConfig.MAX).images[0]
    ```

    Args:
        safety_concept (`str`, *optional*): What to steer away from; default the paper's list. Saved with the pipeline.
            The other arguments are the parent's.
    """

    _card_tags = ("text-to-image", "stable-diffusion")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
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
        **kwargs,
    ) -> StableDiffusionSafePipelineOutput | tuple:
        """Generates images away from the safety concept. Arguments not named here are the parent's.

        Args:
            sld_guidance_scale (`float`, defaults to 1000): With the four below a [`SafetyConfig`]; up to 1, SLD is
                off.
            sld_warmup_steps (`int`, defaults to 10): Denoiser calls that are not changed.
            sld_threshold (`float`, defaults to 0.01): Elements further from the concept than this are left alone.
            sld_momentum_scale (`float`, defaults to 0.3): In [0, 1].
            sld_mom_beta (`float`, defaults to 0.4): In [0, 1).
            safety_concept (`str`, *optional*): Instead of the pipeline's own, for this call.
            safety_prompt_embeds (`torch.Tensor`, *optional*): `(1, tokens, width)`, or one for each image: the concept
                as embeddings.

        Returns:
            [`StableDiffusionSafePipelineOutput`], or the tuple of its values if `return_dict` is `False`.

        Raises:
            `ValueError`: If an argument is out of its range, or concept and embeddings are both given.
        """
        return self._generate(super().__call__, locals())


@with_safety_concept
class StableDiffusionImg2ImgPipelineSafe(_SafeStableDiffusion, StableDiffusionImg2ImgPipeline):
    """[`~diffusers.StableDiffusionImg2ImgPipeline`] with Safe Latent Diffusion, see
    [`StableDiffusionPipelineSafe`]."""

    _card_tags = ("image-to-image", "stable-diffusion")
    _card_example = 'pipeline("a portrait", image=picture, **SafetyConfig.MAX)  # a PIL picture of yours'

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = None,
        image: PipelineImageInput = None,
        strength: float = 0.8,
        num_inference_steps: int | None = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float | None = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float | None = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        sld_guidance_scale: float = 1000,
        sld_warmup_steps: int = 10,
        sld_threshold: float = 0.01,
        sld_momentum_scale: float = 0.3,
        sld_mom_beta: float = 0.4,
        safety_concept: str | None = None,
        safety_prompt_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> StableDiffusionSafePipelineOutput | tuple:
        """Generates images away from the safety concept: the parent's arguments, and those of
        [`StableDiffusionPipelineSafe`]. The warm-up counts from the first denoiser call."""
        return self._generate(super().__call__, locals())


@with_safety_concept
class StableDiffusionInpaintPipelineSafe(_SafeStableDiffusion, StableDiffusionInpaintPipeline):
    """[`~diffusers.StableDiffusionInpaintPipeline`] with Safe Latent Diffusion, see
    [`StableDiffusionPipelineSafe`]."""

    _card_tags = ("image-to-image", "stable-diffusion", "inpainting")
    _card_example = (
        'pipeline("a portrait", image=picture, mask_image=mask, **SafetyConfig.MAX)  # PIL pictures of yours'
    )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = None,
        image: PipelineImageInput = None,
        mask_image: PipelineImageInput = None,
        masked_image_latents: torch.Tensor = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        sld_guidance_scale: float = 1000,
        sld_warmup_steps: int = 10,
        sld_threshold: float = 0.01,
        sld_momentum_scale: float = 0.3,
        sld_mom_beta: float = 0.4,
        safety_concept: str | None = None,
        safety_prompt_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> StableDiffusionSafePipelineOutput | tuple:
        """Generates images away from the safety concept: the parent's arguments, and those of
        [`StableDiffusionPipelineSafe`]. The warm-up counts from the first denoiser call."""
        return self._generate(super().__call__, locals())
