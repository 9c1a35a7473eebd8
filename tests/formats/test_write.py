import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_safe.formats import load_partial, save_partial
from diffusers_safe.provenance import Provenance, fingerprint
from diffusers_safe.weights.trained import select_parameters


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    unet = tiny_pipeline.unet
    provenance = Provenance("base", fingerprint(unet), ["knife", "Van Gogh"], "sdd", "xattn", {})
    parameters = dict(unet.named_parameters())
    weights = {name: parameters[name] + 1 for name in select_parameters(unet, "xattn")}
    path = tmp_path / "erased.safetensors"
    save_partial(weights, provenance, path)
    return unet, weights, provenance, path


def test_round_trip(saved):
    unet, weights, provenance, path = saved
    untouched = {name: value.clone() for name, value in unet.state_dict().items() if name not in weights}
    metadata = load_partial(unet, path)
    state = unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in {**weights, **untouched}.items())
    assert metadata["base_model"] == "base" and metadata["concepts"] == '["knife", "Van Gogh"]'


def test_another_base_model_is_refused(saved, make_tiny_pipeline):
    _, _, _, path = saved
    other = make_tiny_pipeline(seed=1).unet
    with pytest.raises(ValueError, match="made for base with fingerprint"):
        load_partial(other, path)


@pytest.mark.parametrize("change", ["name", "shape", "format"])
def test_what_does_not_fit_is_refused_and_changes_nothing(saved, change):
    unet, weights, _, path = saved
    tensors = load_file(path)
    first = next(iter(tensors))
    metadata = {"format": "diffusers-safe-partial-1", "base_fingerprint": fingerprint(unet), "base_model": "base"}
    if change == "name":
        tensors["mid_block.nowhere"] = torch.zeros(1)
    elif change == "shape":
        tensors[first] = torch.zeros(1, 2, 3)
    else:
        metadata = {}
    save_file(tensors, path, metadata)
    before = fingerprint(unet)
    with pytest.raises(ValueError, match=change if change == "format" else "denoiser"):
        load_partial(unet, path)
    assert fingerprint(unet) == before


def test_missing_and_broken_files(saved, tmp_path):
    unet = saved[0]
    with pytest.raises(ValueError, match="no such file"):
        load_partial(unet, tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_partial(unet, tmp_path / "broken.safetensors")
