"""The interface of a model family, and how a pipeline finds its family."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import loading
from ..arguments import note


# What a denoiser needs to know of a prompt beside latents and timesteps: named tensors, the batch first.
Conditioning = dict[str, torch.Tensor]
# A component's config, with its class as `_class_name`, by the component's name; None where the pipeline has none.
ComponentConfig = Callable[[str], dict[str, Any] | None]


class ModelFamily(ABC):
    """A text-to-image pipeline as training sees it: encode a prompt, predict noise, and the shapes in between.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, whole; training changes its denoiser in place.
        resolution (`int`, *optional*): Height and width of a picture; the model's own if left out.

    Attributes:
        pipeline_classes (`tuple[str, ...]`): Names of the diffusers pipelines of this family.
        tokenizers (`tuple[str, ...]`): Names of the tokenizers in the pipeline.

    Raises:
        `ValueError`: As [`~ModelFamily.check`].
    """

    pipeline_classes: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None):
        self.check(_loaded_configs(pipeline), resolution)
        self.pipeline, self.resolution = pipeline, resolution

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

    @classmethod
    @abstractmethod
    def shape(cls, config: ComponentConfig, resolution: int | None = None) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that is trained."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        return self.shape(_loaded_configs(self.pipeline), self.resolution)

    def check_prompts(self, prompts: list[str]) -> None:
        """
        Raises:
            `ValueError`: If a prompt is longer than the text encoders take: what is cut would not be trained.
        """
        for name in self.tokenizers:
            check_lengths(prompts, getattr(self.pipeline, name))

    def warn_of_unknown_words(self, concepts: list[str], option: str = "concepts") -> None:
        """As [`warn_of_unknown_words`]."""
        warn_of_unknown_words(concepts, [getattr(self.pipeline, name) for name in self.tokenizers], option)

    @property
    @abstractmethod
    def picture_size(self) -> int:
        """Height and width of a picture, in pixels.

        Raises:
            `ValueError`: If they are not the same.
        """

    @abstractmethod
    def encode(self, prompts: list[str], device: torch.device | str = "cpu", truncation: bool = False) -> Conditioning:
        """Encodes prompts on a device, without gradients; the encoders go back to where they were.

        Every tensor has batch size `len(prompts)`. `""` is the unconditional prompt: what the pipeline itself takes
        for guidance where no negative prompt is given. With `truncation`, prompts that are too long are cut, as
        captions of pictures are.

        Raises:
            `ValueError`: As [`~ModelFamily.check_prompts`].
        """

    @abstractmethod
    def encode_with_gradients(self, prompts: list[str], device: torch.device | str = "cpu") -> Conditioning:
        """The same through text encoders that are on the device already, for what learns inside of them.

        Raises:
            `ValueError`: As [`~ModelFamily.check_prompts`].
        """

    @property
    @abstractmethod
    def encoders(self) -> dict[str, nn.Module]:
        """The autoencoder and the text encoders, by their names in the pipeline."""

    @property
    @abstractmethod
    def encoding_identity(self) -> dict[str, str]:
        """What decides how pictures and prompts are encoded, by name: fingerprints of encoders and tokenizers, and of
        the pipeline's config what matters."""

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
            denoiser (`nn.Module`): This family's, possibly wrapped (several processes, mixed precision).
            model_input (`torch.Tensor`): `(B, C, H, W)`, noisy latents after `scheduler.scale_model_input`.
            timesteps (`torch.Tensor`): `(B,)`.
            conditioning (`Conditioning`): From [`~ModelFamily.encode`].

        Returns:
            `torch.Tensor`: `(B, C, H, W)`, in the model's own parametrisation (epsilon, v, ...). Erasure targets are
            affine combinations of predictions at one latent, so they mean the same in each of them.
        """

    def make_scheduler(self) -> SchedulerMixin:
        """A fresh copy of the pipeline's own scheduler."""
        return type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)


def _families() -> tuple[type[ModelFamily], ...]:
    from .stable_diffusion import StableDiffusionFamily
    from .stable_diffusion_xl import StableDiffusionXLFamily

    return (StableDiffusionFamily, StableDiffusionXLFamily)


def find_family(*class_names: str) -> type[ModelFamily]:
    """The family of the first name of a pipeline's class that has one.

    Raises:
        `ValueError`: If none has.
    """
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
        known = component.config if isinstance(component.config, dict) else component.config.to_dict()
        return {**known, "_class_name": type(component).__name__}

    return config


def check_lengths(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        `ValueError`: If a prompt has more tokens than the model takes.
    """
    for prompt in prompts:
        # As the pipelines do it, for embeddings of several vectors.
        converted = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
        count = len(tokenizer(converted).input_ids)
        if count > tokenizer.model_max_length:
            raise ValueError(
                f"prompt '{prompt[:60]}...' has {count} tokens; this model takes {tokenizer.model_max_length}, "
                "and what is cut would not be trained"
            )


def unknown_words(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """The words of a text that a tokenizer does not know, with the tokens it makes of them: an unknown-word token, or
    so many pieces that they have fewer than two letters each, as when a word is spelled byte by byte. (CLIP's makes
    pieces of two letters and more of names that are in no dictionary.)"""
    for token in tokenizer.get_added_vocab():
        text = text.replace(token, " ")
    unknown = {}
    for word in re.findall(r"[^\W\d_]+|[^\w\s]", text):
        pieces = [piece for piece in tokenizer.tokenize(word) if piece != "▁"]
        if not pieces or tokenizer.unk_token in pieces or (len(pieces) > 1 and len(word) < 2 * len(pieces)):
            unknown[word] = pieces
    return unknown


def warn_of_unknown_words(concepts: list[str], tokenizers: list[PreTrainedTokenizerBase], option: str) -> None:
    """Warns of concepts with words that none of a model's tokenizers knows, and of those that encode as no text."""
    for concept in concepts:
        if all(tokenizer(concept).input_ids == tokenizer("").input_ids for tokenizer in tokenizers):
            note("%s '%s': encodes as the empty prompt does, so there is nothing to erase", option, concept)
            continue
        found = [unknown_words(concept, tokenizer) for tokenizer in tokenizers]
        if unknown := {word: pieces for word, pieces in found[0].items() if all(word in other for other in found)}:
            told = ", ".join(f"'{word}' ({len(pieces)} pieces)" for word, pieces in unknown.items())
            note(
                "%s '%s': the model's tokenizer does not know %s; the model may not know it either, and erasing it "
                "may change nothing",
                option,
                concept,
                told,
            )


def load_pipeline(name_or_path: str, **hub_arguments) -> DiffusionPipeline:
    """Loads a pipeline in fp32, as training needs it.

    Raises:
        `ValueError`: If a component is missing or damaged.
    """
    return loading.load_pipeline(name_or_path, f"model '{name_or_path}'", dtype=torch.float32, **hub_arguments)


def make_family(pipeline: DiffusionPipeline, resolution: int | None = None) -> ModelFamily:
    """The family for a loaded pipeline.

    Args:
        pipeline (`DiffusionPipeline`): Of a supported family.
        resolution (`int`, *optional*): Height and width of a picture, in pixels; latents have the size that belongs
            to it. The model's own if left out.

    Raises:
        `ValueError`: If its family is not supported, or [`ModelFamily.check`] refuses it.
    """
    family = find_family(*(base.__name__ for base in type(pipeline).__mro__))
    return family(pipeline, resolution)
