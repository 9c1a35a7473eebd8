"""Stable Diffusion 1.x and 2.x with Safe Latent Diffusion: text to image, image to image, inpainting."""

import copy
from collections.abc import Callable
from typing import Any

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline

from .output import StableDiffusionSafePipelineOutput
from .repository import SafePipelineMixin
from .stock import with_stock_signatures


class _SafeStableDiffusion(SafePipelineMixin):
    """What the three have in common."""

    def run_safety_checker(self, image, device, dtype):
        unchanged = copy.deepcopy(image) if self.safety_checker is not None else None
        image, has_nsfw_concept = super().run_safety_checker(image, device, dtype)
        if has_nsfw_concept is not None and any(has_nsfw_concept):
            self._flagged_images = unchanged[[i for i, flagged in enumerate(has_nsfw_concept) if flagged]]
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


@with_stock_signatures
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


@with_stock_signatures
class StableDiffusionImg2ImgPipelineSafe(_SafeStableDiffusion, StableDiffusionImg2ImgPipeline):
    """[`~diffusers.StableDiffusionImg2ImgPipeline`] with Safe Latent Diffusion, see
    [`StableDiffusionPipelineSafe`]."""

    _card_tags = ("image-to-image", "stable-diffusion")
    _card_example = 'pipeline("a portrait", image=image, **SafetyConfig.MAX)  # a PIL image of yours'


@with_stock_signatures
class StableDiffusionInpaintPipelineSafe(_SafeStableDiffusion, StableDiffusionInpaintPipeline):
    """[`~diffusers.StableDiffusionInpaintPipeline`] with Safe Latent Diffusion, see
    [`StableDiffusionPipelineSafe`]."""

    _card_tags = ("image-to-image", "stable-diffusion", "inpainting")
    _card_example = 'pipeline("a portrait", image=image, mask_image=mask, **SafetyConfig.MAX)  # PIL images of yours'
