import pytest
import torch

from diffusers_safe.formats import read_erased_weights
from diffusers_safe.output_folders import RECORD
from diffusers_safe.provenance import Provenance, fingerprint
from diffusers_safe.training.output import save_result
from diffusers_safe.weights.lora import LoRAWeights, fused
from diffusers_safe.weights.trained import TrainedWeights, select_parameters


PIPELINE = {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}


def train(pipeline, rank=None):
    """Weights that have moved, as after a training, and the provenance of it."""
    provenance = Provenance("base", fingerprint(pipeline.unet), ["knife"], "sdd", "xattn", {})
    names = select_parameters(pipeline.unet, "xattn")
    weights = LoRAWeights(pipeline.unet, names, rank=rank) if rank else TrainedWeights(pipeline.unet, names)
    with torch.no_grad():
        for value in weights.student.values():
            value.add_(0.1)
    return weights, provenance


@pytest.mark.parametrize(
    "save, files",
    [
        ("full", PIPELINE),
        ("partial", {"erased_weights.safetensors"}),
        ("both", PIPELINE | {"erased_weights.safetensors"}),
        ("unet", {"unet"}),
    ],
)
def test_every_result_is_read_back(make_tiny_pipeline, tmp_path, save, files):
    pipeline = make_tiny_pipeline()
    weights, provenance = train(pipeline)
    save_result(pipeline, weights, provenance, tmp_path, save)
    assert {path.name for path in tmp_path.iterdir()} == files | {"erasure.json", RECORD}
    unet = make_tiny_pipeline().unet
    read = read_erased_weights(tmp_path)
    assert read.changes(unet).keys() == weights.student.keys() and read.known["concepts"] == ["knife"]
    read.apply(unet)
    assert fingerprint(unet) == fingerprint(pipeline.unet)


@pytest.mark.parametrize(
    "save, files",
    [
        ("full", PIPELINE),
        ("lora", {"pytorch_lora_weights.safetensors"}),
        ("both", PIPELINE | {"pytorch_lora_weights.safetensors"}),
        ("unet", {"unet"}),
    ],
)
def test_every_result_of_a_lora_is_read_back(make_tiny_pipeline, tmp_path, save, files):
    pipeline = make_tiny_pipeline()
    weights, provenance = train(pipeline, rank=2)
    save_result(pipeline, weights, provenance, tmp_path, save)
    assert {path.name for path in tmp_path.iterdir()} == files | {"erasure.json", RECORD}
    unet = make_tiny_pipeline().unet
    read = read_erased_weights(tmp_path)
    assert read.known["concepts"] == ["knife"]
    read.apply(unet)
    expected = fused(pipeline).unet.state_dict()
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, expected[name])
