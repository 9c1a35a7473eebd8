"""Erasure as a LoRA (Hu et al., arXiv 2106.09685): low-rank adapters train, the base model is not touched.

The adapters are peft's, in place through diffusers' own `add_adapter`. What remains is theirs, too: a pipeline with an
erasure trained into it takes `set_adapters("erasure", 0.5)` and `unload_lora_weights()` as with any LoRA.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from .trained import TrainedWeights


ADAPTER_NAME = "erasure"


class LoRAWeights(TrainedWeights):
    """Student and EMA are adapters on the selected layers; the frozen teacher is the denoiser with adapters off.

    Every linear and convolution layer whose weight is selected gets an adapter; selected biases and norms stay as they
    are. `B` is 0 at first, so the student computes exactly what the base model does until the first step. Only the
    adapters take memory: `frozen` holds the base model's own tensors.

    Args:
        denoiser (`nn.Module`): A diffusers model without adapters; fp32.
        names (`list[str]`): Result of [`select_parameters`].
        ema_decay (`float`, *optional*): As in [`TrainedWeights`].
        rank (`int`): Inner width of the adapters, at least 1.
        alpha (`float`, *optional*): The layers compute `W x + (alpha / rank) B A x`; `rank` by default.
        seed (`int`, defaults to 0): `A` at the start follows from it and from nothing else.

    Raises:
        `ValueError`: If no selected layer can hold an adapter, or the denoiser has adapters already.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        names: list[str],
        ema_decay: float | None = None,
        *,
        rank: int,
        alpha: float | None = None,
        seed: int = 0,
    ):
        self.rank, self.alpha, self.seed = rank, rank if alpha is None else alpha, seed
        super().__init__(denoiser, names, ema_decay)

    def _set_up(self, denoiser: nn.Module, names: list[str]) -> None:
        layers = layers_to_adapt(denoiser, names, self.rank)
        self.frozen = {f"{name}.weight": denoiser.get_submodule(name).weight for name in layers}
        self._denoiser = denoiser
        denoiser.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=layers), ADAPTER_NAME)
        cast_training_params(denoiser)  # fp32, whatever the base model's dtype
        self._layers = list(adapted_layers(denoiser).values())
        self._draw_initial()
        self.student = {name: value for name, value in denoiser.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def _draw_initial(self) -> None:
        """`A` as peft initializes it, but from a separate generator."""
        generator = torch.Generator().manual_seed(self.seed)
        for layer in self._layers:
            weight = layer.lora_A[ADAPTER_NAME].weight
            weight.copy_(nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5), generator=generator))

    def is_in_place(self) -> bool:
        """Whether the adapters are in the denoiser as they were trained: active and not scaled."""
        return ADAPTER_NAME in getattr(self._denoiser, "peft_config", {}) and all(
            ADAPTER_NAME in layer.active_adapters
            and not layer.disable_adapters
            and math.isclose(layer.scaling[ADAPTER_NAME], self.alpha / self.rank, rel_tol=1e-6)
            for layer in self._layers
        )

    def is_fused(self) -> bool:
        """Whether the adapters were added to the weights."""
        return any(layer.merged for layer in self._layers)

    def undo(self) -> None:
        """Takes the adapters off the denoiser."""
        self._denoiser.unload_lora()

    @contextmanager
    def _in_place_of_student(self, which: str) -> Iterator[None]:
        if which != "frozen":
            with super()._in_place_of_student(which):
                yield
            return
        try:
            for layer in self._layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)


def layers_to_adapt(denoiser: nn.Module, names: list[str], rank: int) -> list[str]:
    """The layers that get adapters: linear and convolution layers among the selected weights.

    Raises:
        `ValueError`: If there is none, or the rank exceeds the full rank of all of them.
    """
    modules = dict(denoiser.named_modules())
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    layers = [name for name in layers if isinstance(modules[name], (nn.Linear, nn.Conv2d))]
    if not layers:
        raise ValueError(
            f"rank {rank}: the train method selects no linear or convolution layer that could hold an adapter, only "
            f"{', '.join(names[:3])}..."
        )
    full = max(min(modules[name].weight.flatten(1).shape) for name in layers)
    if rank > full:
        raise ValueError(f"rank {rank}: must be at most {full}, the full rank of the largest selected layer")
    return layers


def adapted_layers(denoiser: nn.Module) -> dict[str, LoraLayer]:
    """The layers of a denoiser that hold the erasure's adapters, by name."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER_NAME in module.lora_A
    }


def adapted_component(pipeline: DiffusionPipeline) -> str:
    """The name of the pipeline's component that holds the erasure's adapters."""
    (name,) = [name for name, part in pipeline.components.items() if ADAPTER_NAME in getattr(part, "peft_config", {})]
    return name


@torch.no_grad()
def fused(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline around a plain denoiser whose weights are `W + (alpha / rank) B A`; no adapters are left.

    The given pipeline keeps its adapters. All tensors but the adapted weights are shared between the two.
    """
    component = adapted_component(pipeline)
    denoiser = getattr(pipeline, component)
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in denoiser.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in adapted_layers(denoiser).items():
        weight = layer.get_base_layer().weight
        if ADAPTER_NAME not in layer.merged_adapters:  # else it is in the weight already
            weight = weight + layer.get_delta_weight(ADAPTER_NAME).to(weight.dtype)
        state[f"{name}.weight"] = weight
    with init_empty_weights(include_buffers=False):
        plain = type(denoiser).from_config(denoiser.config)
    plain.load_state_dict(state, assign=True)
    result = copy.copy(pipeline)
    setattr(result, component, plain.eval())
    return result
