"""The text encoders of a pipeline as one module, for trainings that change them instead of the denoiser."""

from typing import Any

import torch
import transformers
from torch import nn

from .base import ComponentConfig, Conditioning, ModelFamily


class TextEncoders(nn.Module):
    """All text encoders of a pipeline; a forward encodes prompts.

    Args:
        encoders (`dict[str, nn.Module]`): By their names in the pipeline, which begin the parameters' names.
        family (`ModelFamily`, *optional*): Encodes prompts with them; without it there is no forward.
    """

    def __init__(self, encoders: dict[str, nn.Module], family: ModelFamily | None = None):
        super().__init__()
        for name, encoder in encoders.items():
            self.add_module(name, encoder)
        self.family = family

    @classmethod
    def of(cls, family: ModelFamily) -> "TextEncoders":
        """Those of a loaded pipeline."""
        return cls({name: getattr(family.pipeline, name) for name in family.text_encoders}, family)

    @classmethod
    def skeleton(cls, family: type[ModelFamily], config: ComponentConfig) -> "TextEncoders":
        """Their structure: on the meta device, without weights."""
        with torch.device("meta"):
            found = {name: config(name) for name in family.text_encoders}
            return cls({name: _from_config(one) for name, one in found.items() if one is not None})

    def forward(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        return self.family.encode_with_gradients(prompts, device)

    def train(self, mode: bool = True) -> "TextEncoders":
        """Does nothing: with dropout (T5), student and frozen encoders could not be compared."""
        return self

    def enable_gradient_checkpointing(self) -> None:
        """In the denoiser, which gradients pass through: its activations take the memory."""
        self.family.denoiser.enable_gradient_checkpointing()


def _from_config(config: dict[str, Any]) -> nn.Module:
    kind = getattr(transformers, config["_class_name"])
    return kind(kind.config_class.from_dict(config))
