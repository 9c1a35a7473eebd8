"""A LoRA of a difference: as good as its rank allows, exact at full rank, and honest about what it leaves out."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_safe import formats
from diffusers_safe.formats import full_rank


low_rank = partial(formats.low_rank, component="unet")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.tall, self.conv = nn.Linear(12, 7), nn.Linear(7, 12), nn.Conv2d(6, 5, 3)
        self.norm = nn.LayerNorm(5)


@pytest.fixture
def changed():
    torch.manual_seed(0)
    net = Net()
    names = ["wide.weight", "tall.weight", "conv.weight"]
    parameters = dict(net.named_parameters())
    return net, {name: parameters[name].detach() + torch.randn_like(parameters[name]) for name in names}


def matrices(net, erased):
    parameters = dict(net.named_parameters())
    return {name: (value - parameters[name]).detach().flatten(1).double().numpy() for name, value in erased.items()}


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_errors_are_the_least_that_the_rank_allows(changed, rank):
    net, erased = changed
    lora = low_rank(net, erased, rank)
    rest, total = 0, 0
    for name, matrix in matrices(net, erased).items():
        values = np.linalg.svd(matrix, compute_uv=False)
        best = np.sqrt((values[rank:] ** 2).sum())
        assert lora.errors[name] == pytest.approx(best / np.linalg.norm(matrix), abs=1e-6)
        rest, total = rest + best**2, total + (values**2).sum()
    assert lora.error == pytest.approx(np.sqrt(rest / total), abs=1e-6)
    assert lora.errors[lora.worst] == max(lora.errors.values())


def test_more_rank_less_error_and_full_rank_none(changed):
    net, erased = changed
    errors = [low_rank(net, erased, rank).error for rank in range(1, 8)]
    assert all(more < less for less, more in zip(errors, errors[1:6])) and errors[-1] < 1e-6
    full = low_rank(net, erased, full_rank(net, erased))
    assert full.rank == 7 and full.tensors["unet.conv.lora_A.weight"].shape == (5, 6, 3, 3)
    assert full.tensors["unet.conv.lora_B.weight"].shape == (5, 5, 1, 1)


def test_biases_are_left_out_and_counted_or_held_exactly(changed):
    net, erased = changed
    erased["wide.bias"] = net.wide.bias.detach() + 2
    held = low_rank(net, erased, 7, biases=True)
    assert held.error < 1e-6 and held.left_out == []
    assert torch.allclose(held.tensors["unet.wide.lora_B.bias"], torch.full((7,), 2.0))
    assert not held.tensors["unet.tall.lora_B.bias"].any()
    plain = low_rank(net, erased, 7)
    total = sum(np.linalg.norm(matrix) ** 2 for matrix in matrices(net, {k: erased[k] for k in plain.errors
                                                                        if k != "wide.bias"}).values())  # fmt: skip
    assert plain.left_out == ["wide.bias"] and plain.errors["wide.bias"] == pytest.approx(1)
    assert plain.error == pytest.approx((28 / (total + 28)) ** 0.5) and plain.worst != "wide.bias"
    assert plain.lost == pytest.approx(plain.error) and held.lost == 0
    assert not any("bias" in name for name in plain.tensors)
    with pytest.raises(ValueError, match="any of the 1 changed parameters, such as wide.bias; --biases stores biases"):
        low_rank(net, {"wide.bias": erased["wide.bias"]}, 1)


def test_a_norm_is_told_before_it_is_lost(changed):
    net, erased = changed
    erased["norm.weight"] = net.norm.weight.detach() + 1
    with pytest.raises(ValueError, match=r"cannot hold norm.weight: \d+\.\d% of the change would be lost"):
        low_rank(net, erased, 2)
    assert low_rank(net, erased, 2, only_weights=True).left_out == ["norm.weight"]
    with pytest.raises(ValueError, match="cannot hold any of the 1 changed parameters"):
        low_rank(net, {"norm.weight": erased["norm.weight"]}, 2, only_weights=True)


@pytest.mark.parametrize("rank", [0, 8])
def test_a_rank_that_no_layer_has_is_told(changed, rank):
    net, erased = changed
    with pytest.raises(ValueError, match=f"rank {rank}: must be from 1 to 7, with which a LoRA holds this change"):
        low_rank(net, erased, rank)
