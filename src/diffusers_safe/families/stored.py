"""A model on disk or on the Hub before it is loaded: only configs and tokenizers are read, no weights."""

from functools import cache, cached_property
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..embedded import locate_model
from ..loading import check_component
from ..model_errors import ModelError, naming
from ..model_files import read_config, read_index
from .base import vae_scale_factor
from .files import check_files
from .prompts import check_lengths, warn_of_unknown_words
from .registry import denoiser_names, families, family_of_class, find_family


class StoredModel:
    """A pipeline by its configs and tokenizers: what of a [`ModelFamily`] needs no weights.

    Args:
        name_or_path (`str`): Hub id or folder of a diffusers pipeline.
        resolution (`int`, *optional*): As [`make_family`] takes it.
        argument (`str`, defaults to `"pretrained_model_name_or_path"`): The option with the name, for messages.
        hub_arguments: Of `load_config`, such as `revision`.

    Raises:
        `ValueError`: If there is no diffusers pipeline there, its family is not supported, or [`ModelFamily.check`]
            refuses it.
    """

    def __init__(
        self,
        name_or_path: str,
        resolution: int | None = None,
        argument: str = "pretrained_model_name_or_path",
        **hub_arguments,
    ):
        self.name_or_path, self.resolution = locate_model(name_or_path), resolution
        self._hub = hub_arguments
        self.config = cache(self._config)
        self._what = f"{argument} '{name_or_path}'"
        self._index = read_index(name_or_path, self._what, **hub_arguments)
        class_name = self._index["_class_name"]
        self.family = find_family(class_name if isinstance(class_name, str) else class_name[-1])
        with naming(self._what, ValueError):
            self.family.check(self.config, resolution)

    def _config(self, name: str) -> dict[str, Any] | None:
        library, class_name = self._index.get(name, (None, None))
        if library is None:
            return None
        reader = DDIMScheduler if name == "scheduler" else AutoencoderKL  # whose config has the same file name
        config = read_config(reader, self.name_or_path, f"{self._what}: {name}", subfolder=name, **self._hub)
        return {**config, "_class_name": class_name}

    def check_files(self, variant: str | None = None) -> None:
        """Looks at the weight files of a folder; nothing of a Hub repository is downloaded.

        Raises:
            `ValueError`: If weights are missing or damaged.
        """
        check_files(self.name_or_path, self._what, variant)

    @property
    def denoiser_name(self) -> str:
        """The denoiser's name among the components."""
        return self.family.denoiser_name

    @cached_property
    def denoiser(self) -> nn.Module:
        """The denoiser's structure, on the meta device."""
        with naming(f"{self._what}: {self.family.denoiser_name}"):
            return self.family.skeleton(self.config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        return self.family.shape(self.config, self.resolution)

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        _, height, width = self.latent_shape
        scale = vae_scale_factor(self.config("vae"))
        return width * scale, height * scale

    @cached_property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """
        Raises:
            `ValueError`: If one cannot be loaded.
        """
        found = []
        for name in self.family.tokenizers:
            if name in self.family.optional and self._index.get(name, (None,))[0] is None:
                continue
            with naming(f"{self._what}: {name}"):
                found.append(AutoTokenizer.from_pretrained(self.name_or_path, subfolder=name, **self._hub))
                check_component(found[-1], f"{self._what}: {name}")
        return found

    def check_prompts(self, prompts: list[str]) -> None:
        """
        Raises:
            `ValueError`: If a prompt is longer than the text encoders take: what is cut would not be trained.
        """
        for tokenizer in self.tokenizers:
            check_lengths(prompts, tokenizer)

    def warn_of_unknown_words(self, concepts: list[str], option: str = "concepts") -> None:
        """As [`warn_of_unknown_words`]."""
        warn_of_unknown_words(concepts, self.tokenizers, option)

    def make_scheduler(self, num_inference_steps: int | None = None) -> SchedulerMixin:
        """A new scheduler; with a number of steps, set up for a trajectory."""
        config = self.config("scheduler")
        with naming(f"{self._what}: scheduler"):
            scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        if num_inference_steps is not None:
            self.family.set_timesteps(scheduler, num_inference_steps, self.latent_shape)
        return scheduler


def stored_denoiser(name_or_path: str, argument: str, **hub_arguments) -> nn.Module:
    """The structure of the denoiser in a pipeline, or in the folder of a denoiser that was saved alone: on the meta
    device, without weights.

    Raises:
        `ValueError`: If there is none.
    """
    names = denoiser_names()
    what = f"{argument} '{name_or_path}': no folder or Hub repository with a {' or '.join(names)}"
    for name in names:
        try:
            config = read_config(AutoencoderKL, name_or_path, what, subfolder=name, **hub_arguments)
        except ModelError as error:
            failure = error
            continue
        same_name = next(family for family in families() if family.denoiser_name == name)
        family = family_of_class(config["_class_name"]) if "_class_name" in config else same_name
        if family is None:
            raise ModelError(f"{what}: {name} is a {config['_class_name']}")
        with naming(f"{argument} '{name_or_path}': {name}"), torch.device("meta"):
            return family.denoiser_class.from_config(config)
    raise failure
