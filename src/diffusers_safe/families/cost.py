"""What a UNet's forward and backward take, counted on the meta device: shapes only, nothing is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode


def blank_inputs(unet: UNet2DConditionModel, shape: tuple[int, int, int, int], tokens: int) -> dict:
    """Inputs without values for a UNet on the meta device.

    Args:
        unet (`UNet2DConditionModel`): Its config says what it takes.
        shape (`tuple[int, int, int, int]`): Of the latents: `(B, C, H, W)`.
        tokens (`int`): Length of a prompt.

    Returns:
        `dict`: The arguments of its forward.
    """
    config, batch_size = unet.config, shape[0]
    widths = config.cross_attention_dim
    width = widths if isinstance(widths, int) else widths[0]
    inputs = {
        "sample": torch.empty(shape, device="meta"),
        "timestep": torch.empty(batch_size, dtype=torch.long, device="meta"),
        "encoder_hidden_states": torch.empty(batch_size, tokens, width, device="meta"),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch_size, pooled, device="meta"),
            "time_ids": torch.empty(batch_size, 6, device="meta"),
        }
    return inputs


@torch.no_grad()
def forward_flops(unet: UNet2DConditionModel, inputs: dict) -> float:
    """FLOPs of one sample's forward, two for a multiply-accumulate: convolutions, linear layers, attention."""
    with _plain_attention(), FlopCounterMode(display=False) as forward:
        unet(**inputs)
    return forward.get_total_flops() / len(inputs["sample"])


def macs(config: dict, latent_shape: tuple[int, int, int], tokens: int) -> float:
    """Multiply-accumulates of one forward of one sample, of a UNet with this config."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return forward_flops(unet, blank_inputs(unet, (1, *latent_shape), tokens)) / 2


def training_cost(unet: UNet2DConditionModel, inputs: dict) -> tuple[float, float, float]:
    """FLOPs of a sample's forward and backward, and the bytes that a batch keeps for its backward."""
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with _plain_attention():
        with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
            output = unet(**inputs, return_dict=False)[0]
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    activations = sum(storage.nbytes() for storage in kept.values())
    batch_size = len(inputs["sample"])
    return forward.get_total_flops() / batch_size, backward.get_total_flops() / batch_size, activations


@contextmanager
def _plain_attention() -> Iterator[None]:
    """The attention for meta tensors keeps the matrix of weights; the kernels of CPUs and GPUs do not."""
    with patch.object(functional, "scaled_dot_product_attention", lambda q, k, v, **_: _Attention.apply(q, k, v)):
        yield


class _Attention(torch.autograd.Function):
    """The matrix products of attention that keeps its inputs only, and nothing else of it."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return query @ key.transpose(-1, -2) @ value

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        weights = query @ key.transpose(-1, -2)
        weights_gradient = gradient @ value.transpose(-1, -2)
        return (
            weights_gradient @ key,
            weights_gradient.transpose(-1, -2) @ query,
            weights.transpose(-1, -2) @ gradient,
        )
