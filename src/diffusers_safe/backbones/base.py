"""The interface of a model family, and how a pipeline on disk or on the Hub finds its family."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn


# What a denoiser needs to know of a prompt beside latents and timesteps: named tensors, the batch first.
Conditioning = dict[str, torch.Tensor]


class Backbone(ABC):
    """A text-to-image pipeline as training sees it: encode a prompt, predict noise, and the shapes in between.

    Attributes:
        pipeline (`DiffusionPipeline`): The pipeline, whole; training changes its denoiser in place.
        pipeline_classes (`tuple[str, ...]`): Names of the diffusers pipelines of this family.
    """

    pipeline_classes: tuple[str, ...] = ()

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that is trained."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent at the model's own resolution."""

    @abstractmethod
    def encode(self, prompts: list[str], device: torch.device | str = "cpu") -> Conditioning:
        """Encodes prompts on a device, without gradients; the encoder goes back to where it was.

        Every tensor has batch size `len(prompts)`.

        Raises:
            `ValueError`: If a prompt is longer than the text encoder takes: what is cut would not be trained.
        """

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """One forward of a denoiser.

        Args:
            denoiser (`nn.Module`): This backbone's, possibly wrapped (several processes, mixed precision).
            model_input (`torch.Tensor`): `(B, C, H, W)`, noisy latents after `scheduler.scale_model_input`.
            timesteps (`torch.Tensor`): `(B,)`.
            conditioning (`Conditioning`): From [`~Backbone.encode`].

        Returns:
            `torch.Tensor`: `(B, C, H, W)`, in the model's own parametrisation (epsilon, v, ...). Erasure targets are
            affine combinations of predictions at one latent, so they mean the same in each of them.
        """

    def make_scheduler(self) -> SchedulerMixin:
        """A fresh copy of the pipeline's own scheduler."""
        return type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)


def _families() -> tuple[type[Backbone], ...]:
    from .stable_diffusion import StableDiffusionBackbone

    return (StableDiffusionBackbone,)


def _supported() -> list[str]:
    return [name for family in _families() for name in family.pipeline_classes]


def _unsupported(class_name: str) -> ValueError:
    known = ", ".join(_supported())
    return ValueError(f"{class_name}: this model family is not supported yet; supported pipelines are {known}")


def check_model(name_or_path: str, **hub_arguments) -> None:
    """Looks at a model's index only, so that a wrong path or family is told before anything is loaded.

    Raises:
        `ValueError`: If there is no diffusers pipeline there, or it is of a family that is not supported.
    """
    try:
        index = DiffusionPipeline.load_config(name_or_path, **hub_arguments)
    except (OSError, ValueError) as error:
        where = "folder" if Path(name_or_path).exists() else "folder or Hub repository"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"pretrained_model_name_or_path '{name_or_path}': no {where} of a diffusers pipeline "
                         f"(a folder needs a model_index.json): {reason}") from None  # fmt: skip
    class_name = index.get("_class_name", "a model_index.json without _class_name")
    class_name = class_name if isinstance(class_name, str) else class_name[-1]
    if class_name not in _supported():
        raise _unsupported(class_name)


def load_pipeline(name_or_path: str, **hub_arguments) -> DiffusionPipeline:
    """Loads a supported pipeline in fp32, as training needs it. Call [`check_model`] first for clear errors."""
    return DiffusionPipeline.from_pretrained(name_or_path, dtype=torch.float32, **hub_arguments)


def make_backbone(pipeline: DiffusionPipeline) -> Backbone:
    """The backbone for a loaded pipeline.

    Raises:
        `ValueError`: If its family is not supported.
    """
    for base in type(pipeline).__mro__:
        for family in _families():
            if base.__name__ in family.pipeline_classes:
                return family(pipeline)
    raise _unsupported(type(pipeline).__name__)
