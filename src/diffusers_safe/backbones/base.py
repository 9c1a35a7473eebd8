"""The interface of a model family, and how a pipeline on disk or on the Hub finds its family."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from torch import nn


# What a denoiser needs to know of a prompt beside latents and timesteps: named tensors, the batch first.
Conditioning = dict[str, torch.Tensor]
# A component's config by the component's name; None where the pipeline has no such component.
ComponentConfig = Callable[[str], dict[str, Any] | None]


class Backbone(ABC):
    """A text-to-image pipeline as training sees it: encode a prompt, predict noise, and the shapes in between.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, whole; training changes its denoiser in place.
        resolution (`int`, *optional*): Height and width of a picture; the model's own if left out.

    Attributes:
        pipeline_classes (`tuple[str, ...]`): Names of the diffusers pipelines of this family.

    Raises:
        `ValueError`: As [`~Backbone.check`].
    """

    pipeline_classes: tuple[str, ...] = ()

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None):
        self.check(_loaded_configs(pipeline), resolution)
        self.pipeline = pipeline

    @classmethod
    @abstractmethod
    def check(cls, config: ComponentConfig, resolution: int | None = None) -> None:
        """Looks at the configs of a pipeline's components, loaded or not.

        Raises:
            `ValueError`: If training cannot give this model all that it takes, or not at this resolution.
        """

    @classmethod
    @abstractmethod
    def skeleton(cls, config: ComponentConfig) -> nn.Module:
        """The denoiser's structure: on the meta device, without weights."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that is trained."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Height and width of a picture, in pixels."""

    @abstractmethod
    def encode(self, prompts: list[str], device: torch.device | str = "cpu", truncation: bool = False) -> Conditioning:
        """Encodes prompts on a device, without gradients; the encoders go back to where they were.

        Every tensor has batch size `len(prompts)`. `""` is the unconditional prompt: what the pipeline itself takes
        for guidance where no negative prompt is given. With `truncation`, prompts that are too long are cut, as
        captions of pictures are.

        Raises:
            `ValueError`: If a prompt is longer than the text encoder takes: what is cut would not be trained.
        """

    @property
    @abstractmethod
    def encoders(self) -> dict[str, nn.Module]:
        """The autoencoder and the text encoders, by their names in the pipeline."""

    @abstractmethod
    def encode_pictures(self, pixel_values: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Encodes pictures on a device, without gradients; the autoencoder goes back to where it was.

        Args:
            pixel_values (`torch.Tensor`): `(B, 3, height, width)`, in [-1, 1].

        Returns:
            `torch.Tensor`: Mean and log variance of the latents, `(B, 2 * C, H, W)`.
        """

    @abstractmethod
    def draw_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Latents with these moments, each drawn from a generator of its own and scaled as the denoiser takes them;
        `(B, C, H, W)`, float32."""

    def with_sizes(
        self, conditioning: Conditioning, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor
    ) -> Conditioning:
        """Encoded prompts for pictures of these sizes, cropped there; both `(B, 2)`, vertical first. A model that is
        not told of sizes gets the same."""
        return conditioning

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
    from .stable_diffusion_xl import StableDiffusionXLBackbone

    return (StableDiffusionBackbone, StableDiffusionXLBackbone)


def _find_family(*class_names: str) -> type[Backbone]:
    """The family of the first name that has one."""
    families = {name: family for family in _families() for name in family.pipeline_classes}
    for name in class_names:
        if name in families:
            return families[name]
    raise ValueError(
        f"{class_names[0]}: this model family is not supported yet; supported pipelines are {', '.join(families)}"
    )


def _loaded_configs(pipeline: DiffusionPipeline) -> ComponentConfig:
    def config(name: str) -> dict[str, Any] | None:
        component = getattr(pipeline, name, None)
        if component is None:
            return None
        return component.config if isinstance(component.config, dict) else component.config.to_dict()

    return config


def check_model(name_or_path: str, resolution: int | None = None, **hub_arguments) -> nn.Module:
    """Looks at a model's configs only, so that what cannot be trained is told before anything is loaded.

    Args:
        name_or_path (`str`): Hub id or folder of a diffusers pipeline.
        resolution (`int`, *optional*): As [`make_backbone`] takes it.

    Returns:
        `nn.Module`: The denoiser's structure, on the meta device.

    Raises:
        `ValueError`: If there is no diffusers pipeline there, its family is not supported, or [`Backbone.check`]
            refuses it.
    """

    def read(**where) -> dict[str, Any]:
        loader = UNet2DConditionModel if where else DiffusionPipeline  # they differ in the name of the file
        try:
            return loader.load_config(name_or_path, **where, **hub_arguments)
        except (OSError, ValueError) as error:
            kind = "folder" if Path(name_or_path).exists() else "folder or Hub repository"
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"pretrained_model_name_or_path '{name_or_path}': no {kind} of a diffusers pipeline "
                             f"(a folder needs a model_index.json): {reason}") from None  # fmt: skip

    index = read()
    class_name = index.get("_class_name", "a model_index.json without _class_name")
    family = _find_family(class_name if isinstance(class_name, str) else class_name[-1])

    def config(name: str) -> dict[str, Any] | None:
        library, _ = index.get(name, (None, None))
        return None if library is None else read(subfolder=name)

    family.check(config, resolution)
    return family.skeleton(config)


def load_pipeline(name_or_path: str, **hub_arguments) -> DiffusionPipeline:
    """Loads a supported pipeline in fp32, as training needs it. Call [`check_model`] first for clear errors."""
    return DiffusionPipeline.from_pretrained(name_or_path, dtype=torch.float32, **hub_arguments)


def make_backbone(pipeline: DiffusionPipeline, resolution: int | None = None) -> Backbone:
    """The backbone for a loaded pipeline.

    Args:
        pipeline (`DiffusionPipeline`): Of a supported family.
        resolution (`int`, *optional*): Height and width of a picture, in pixels; latents have the size that belongs
            to it. The model's own if left out.

    Raises:
        `ValueError`: If its family is not supported, or [`Backbone.check`] refuses it.
    """
    family = _find_family(*(base.__name__ for base in type(pipeline).__mro__))
    return family(pipeline, resolution)
