import pytest
import torch

from diffusers_safe.formats import read_erased_weights
from diffusers_safe.provenance import Provenance, fingerprint
from diffusers_safe.training.output import save_result
from diffusers_safe.weights import select_parameters


@pytest.mark.parametrize(
    "save, files",
    [
        ("full", {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}),
        ("partial", {"erased_weights.safetensors"}),
        ("unet", {"unet"}),
    ],
)
def test_every_result_is_read_back(make_tiny_pipeline, tmp_path, save, files):
    pipeline = make_tiny_pipeline()
    provenance = Provenance("base", fingerprint(pipeline.unet), ["knife"], "sdd", "xattn", {})
    parameters = dict(pipeline.unet.named_parameters())
    erased = {name: parameters[name] for name in select_parameters(pipeline.unet, "xattn")}
    with torch.no_grad():
        for value in erased.values():
            value.add_(0.1)
    save_result(pipeline, erased, provenance, tmp_path, save)
    assert {path.name for path in tmp_path.iterdir()} == files | {"erasure.json"}
    unet = make_tiny_pipeline().unet
    read = read_erased_weights(tmp_path)
    assert read.changes(unet).keys() == erased.keys() and read.known["concepts"] == ["knife"]
    read.apply(unet)
    assert fingerprint(unet) == fingerprint(pipeline.unet)
