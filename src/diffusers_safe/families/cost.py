"""What a denoiser's forward and backward passes take, counted on the meta device: shapes only, nothing is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from .registry import family_of_denoiser


@torch.no_grad()
def forward_flops(denoiser: nn.Module, inputs: dict) -> float:
    """FLOPs of one sample's forward pass, two for a multiply-accumulate: convolutions, linear layers, attention."""
    with _plain_attention(), FlopCounterMode(display=False) as forward:
        denoiser(**inputs)
    return forward.get_total_flops() / _batch_size(inputs)


def macs(denoiser: nn.Module, latent_shape: tuple[int, int, int], tokens: int) -> float:
    """Multiply-accumulates of one forward pass of one sample, of a denoiser with this one's config.

    Args:
        denoiser (`nn.Module`): On any device.
        latent_shape (`tuple[int, int, int]`): `(C, H, W)`.
        tokens (`int`): Length of a prompt.
    """
    with torch.device("meta"):
        empty = type(denoiser).from_config(denoiser.config)
    inputs = family_of_denoiser(empty).blank_inputs(empty, (1, *latent_shape), tokens)
    return forward_flops(empty, inputs) / 2


def training_cost(denoiser: nn.Module, inputs: dict) -> tuple[float, float, float]:
    """FLOPs of a sample's forward and backward pass, and the bytes that a batch keeps for the latter."""
    own = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with _plain_attention():
        with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
            output = denoiser(**inputs, return_dict=False)[0]
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    activations = sum(storage.nbytes() for storage in kept.values())
    batch_size = _batch_size(inputs)
    return forward.get_total_flops() / batch_size, backward.get_total_flops() / batch_size, activations


def _batch_size(inputs: dict) -> int:
    return len(next(iter(inputs.values())))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """The attention for meta tensors keeps the matrix of weights; the kernels of CPUs and GPUs do not."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_) -> torch.Tensor:
        return _Attention.apply(query, key, value)

    with patch.object(functional, "scaled_dot_product_attention", attend):
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
