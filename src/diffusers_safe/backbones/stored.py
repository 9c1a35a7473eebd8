"""A model on disk or on the Hub before it is loaded: what its small files tell, and no weights are read in vain."""

from functools import cache, cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .base import check_lengths, find_family, warn_of_unknown_words


# Whose `load_config` reads a component's config: they differ in the name of the file.
_READERS = {"index": DiffusionPipeline, "scheduler": DDIMScheduler}


class StoredModel:
    """A pipeline by its configs and tokenizers: what of a [`Backbone`] needs no weights.

    Args:
        name_or_path (`str`): Hub id or folder of a diffusers pipeline.
        resolution (`int`, *optional*): As [`make_backbone`] takes it.
        argument (`str`, defaults to `"pretrained_model_name_or_path"`): Who gave the name, for messages.
        hub_arguments: Of `load_config`, such as `revision`.

    Raises:
        `ValueError`: If there is no diffusers pipeline there, its family is not supported, or [`Backbone.check`]
            refuses it.
    """

    def __init__(
        self,
        name_or_path: str,
        resolution: int | None = None,
        argument: str = "pretrained_model_name_or_path",
        **hub_arguments,
    ):
        self.name_or_path, self.resolution = name_or_path, resolution
        self._argument, self._hub = argument, hub_arguments
        self.config = cache(self._config)
        self._index = self._read("index")
        class_name = self._index.get("_class_name", "a model_index.json without _class_name")
        self.family = find_family(class_name if isinstance(class_name, str) else class_name[-1])
        self.family.check(self.config, resolution)

    def _config(self, name: str) -> dict[str, Any] | None:
        library, class_name = self._index.get(name, (None, None))
        return None if library is None else {**self._read(name, subfolder=name), "_class_name": class_name}

    def _read(self, name: str, **where) -> dict[str, Any]:
        reader = _READERS.get(name, UNet2DConditionModel)
        try:
            return reader.load_config(self.name_or_path, **where, **self._hub)
        except (OSError, ValueError) as error:
            kind = "folder" if Path(self.name_or_path).exists() else "folder or Hub repository"
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{self._argument} '{self.name_or_path}': no {kind} of a diffusers pipeline "
                             f"(a folder needs a model_index.json): {reason}") from None  # fmt: skip

    @cached_property
    def denoiser(self) -> nn.Module:
        """The denoiser's structure, on the meta device."""
        return self.family.skeleton(self.config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        return self.family.shape(self.config, self.resolution)

    @cached_property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """
        Raises:
            `ValueError`: If one cannot be loaded.
        """
        found = []
        for name in self.family.tokenizers:
            try:
                found.append(AutoTokenizer.from_pretrained(self.name_or_path, subfolder=name, **self._hub))
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{self._argument} '{self.name_or_path}': no {name} ({reason})") from None
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

    def make_scheduler(self) -> SchedulerMixin:
        """A fresh scheduler."""
        config = self.config("scheduler")
        return getattr(diffusers, config["_class_name"]).from_config(config)


def stored_unet(name_or_path: str, argument: str, **hub_arguments) -> UNet2DConditionModel:
    """The structure of the UNet in a pipeline, or in a folder `unet` by itself: on the meta device, without weights.

    Raises:
        `ValueError`: If there is none.
    """
    try:
        config = UNet2DConditionModel.load_config(name_or_path, subfolder="unet", **hub_arguments)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{argument} '{name_or_path}': no folder or Hub repository with a UNet ({reason})") from None
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def check_model(name_or_path: str, resolution: int | None = None, **hub_arguments) -> nn.Module:
    """The denoiser's structure of a [`StoredModel`], which is checked.

    Raises:
        `ValueError`: As [`StoredModel`].
    """
    return StoredModel(name_or_path, resolution, **hub_arguments).denoiser
