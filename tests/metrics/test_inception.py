import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from diffusers_safe.metrics.fid import inception
from diffusers_safe.metrics.inception import FIDInception, Mixed


def weights(model, seed=0):
    """Weights that follow from their names' order, of a size that lets signals through."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in sorted(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue  # as in the published file, which is older
        drawn = torch.randn(value.shape, generator=generator)
        if value.ndim == 4:
            state[name] = drawn * (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            state[name] = 1 + 0.1 * drawn.abs()
        else:
            state[name] = 0.1 * drawn + (1.0 if name.endswith("bn.weight") else 0.0)
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights(FIDInception()), path)
    return path


def test_names_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        state = {name: tuple(value.shape) for name, value in FIDInception().state_dict().items()}
    convolutions = [name for name in state if name.endswith("conv.weight")]
    assert len(convolutions) == 94
    assert len([name for name in state if not name.endswith("num_batches_tracked")]) == 5 * 94 + 2
    assert state["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert state["Mixed_5d.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert state["Mixed_6a.branch3x3.conv.weight"] == (384, 288, 3, 3)
    assert state["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert state["Mixed_6e.branch7x7dbl_5.conv.weight"] == (192, 192, 1, 7)
    assert state["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert state["Mixed_7b.branch3x3_2a.conv.weight"] == (384, 384, 1, 3)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert state["Mixed_7c.branch_pool.bn.running_var"] == (192,) and state["fc.weight"] == (1008, 2048)


def test_padding_does_not_count_in_averages():
    block = Mixed(4, {"branch1x1": [(3, (1, 1))]}, "average", 2).eval()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        corner = x[:, :, :2, :2].mean(dim=(2, 3), keepdim=True)
        assert torch.allclose(block(x)[:, 3:, :1, :1], block.branch_pool(corner), atol=1e-6)
        block.pool = "maximum"
        most = functional.max_pool2d(x, 3, 1, 1)
        assert torch.allclose(block(x)[:, 3:], block.branch_pool(most), atol=1e-6)


def test_features_are_those_of_torch_fidelity(file, on_cpu):
    y, x = np.mgrid[:299, :299]
    image = Image.fromarray(np.stack([x % 256, y % 256, (x * y) % 256], -1).astype(np.uint8))
    features = inception(file, "torchmetrics").features([image])
    assert features.shape == (1, 2048)
    # torch-fidelity 0.3.0's FeatureExtractorInceptionV3 with these weights
    assert features[0, [0, 1, 700, 2047]].tolist() == pytest.approx([0.93163, 0, 0.46392, 0.32276], rel=1e-3)
    assert float(features.mean()) == pytest.approx(0.231413, rel=1e-4)


def test_other_files_are_refused(tmp_path, file):
    with pytest.raises(ValueError, match="fid_weights: none given; download .*github.com/mseitzer/pytorch-fid"):
        inception(None)
    state = torch.load(file)
    state["Mixed_6a.extra"] = state.pop("fc.bias")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the FID's Inception .*; it lacks fc.bias"):
        inception(tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"none")
    with pytest.raises(ValueError, match="not a file of weights"):
        inception(tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="clean, bk-sdm, pytorch-fid, torchmetrics"):
        inception(file, "bicubic")
