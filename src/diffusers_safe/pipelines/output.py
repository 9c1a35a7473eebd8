"""What a safe pipeline returns."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
from diffusers.utils import BaseOutput


@dataclass
class StableDiffusionSafePipelineOutput(BaseOutput):
    """The fields are those that diffusers' class had, in the order of the tuple it returned.

    Attributes:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): As `output_type` says.
        nsfw_content_detected (`list[bool]`, *optional*): What the pipeline's safety checker said of each image; `None`
            without one.
        applied_safety_concept (`str`, *optional*): What the images were steered away from; `None` if they were not.
            `""` for a concept that was given as embeddings.
        unsafe_images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, *optional*): The images that the safety
            checker blackened, as they were; `None` if there are none.
    """

    images: list[PIL.Image.Image] | np.ndarray
    nsfw_content_detected: list[bool] | None
    applied_safety_concept: str | None
    unsafe_images: list[PIL.Image.Image] | np.ndarray | None
