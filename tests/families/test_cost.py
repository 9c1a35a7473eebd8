"""What is counted on the meta device, against a count by hand and against published numbers."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffusers_safe.families import StableDiffusionFamily
from diffusers_safe.families.cost import forward_flops
from diffusers_safe.families.students import TEACHER_CONFIGS, build_student


def layers_by_hand(unet, run):
    """Multiply-accumulates of the convolutions and linear layers in `run()`."""
    counts = []

    def count(module, _, output):
        inputs = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        counts.append(output.numel() * inputs)

    layers = [module for module in unet.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return sum(counts)


def attention_by_hand(config, size, tokens):
    """Of two products, weights and values, in each transformer block of a UNet of SD's shape, `layers_per_block` 2."""
    total = 0
    for level, channels in enumerate(config.block_out_channels[:3]):
        pixels = (size // 2**level) ** 2
        total += 5 * 2 * channels * pixels * (pixels + tokens)
    deepest = (size // 8) ** 2
    return total + 2 * config.block_out_channels[3] * deepest * (deepest + tokens)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_forward_is_counted_as_by_hand(tiny_pipeline, batch_size):
    config = tiny_pipeline.unet.config
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    inputs = StableDiffusionFamily.blank_inputs(unet, (batch_size, 4, 8, 8), 7)
    layers = layers_by_hand(tiny_pipeline.unet, lambda: tiny_pipeline.unet(
        torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 7, 32)))  # fmt: skip
    assert forward_flops(unet, inputs) == 2 * (layers + attention_by_hand(config, 8, 7))


def test_inputs_of_every_family_fit(make_tiny_pipeline, make_tiny_sd_2_pipeline, make_tiny_xl_pipeline):
    for make in (make_tiny_pipeline, make_tiny_sd_2_pipeline, make_tiny_xl_pipeline):
        config = make().unet.config
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        assert forward_flops(unet, StableDiffusionFamily.blank_inputs(unet, (1, 4, 8, 16), 5)) > 0


# Of BK-SDM's authors (issue 53 of their repository), by thop, which does not count the products of attention.
@pytest.mark.parametrize("student, published", [(None, 338_749_194_240), ("bk-base", 223_755_632_640)])
def test_published_counts(student, published):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**TEACHER_CONFIGS["sd-1.5"])
    unet = unet if student is None else build_student(unet, student)
    inputs, counts = StableDiffusionFamily.blank_inputs(unet, (1, 4, 64, 64), 77), []
    layers = layers_by_hand(unet, lambda: counts.append(forward_flops(unet, inputs) / 2))
    assert layers == pytest.approx(published, rel=5e-4) and counts[0] > 1.1 * layers
