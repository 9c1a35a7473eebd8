import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from diffusers_safe.metrics.lpips import LPIPS, NETS
from metric_models import pictures, rows_of, save_trunk


def save_linear(path, net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"lin{i}.model.1.weight": torch.rand(1, count, 1, 1, generator=generator)
        for i, count in enumerate(NETS[net][2])
    }
    torch.save(state, path)
    return state


def by_hand(net, trunk, linear, first, second):
    """The formula channel by channel, features from a plain list of layers of torchvision's source."""
    weights = iter(sorted({int(name.split(".")[1]) for name in trunk if name.startswith("features")}))
    if net == "alex":
        plan = [(4, 2), "tap", ("pool", 3), (1, 2), "tap", ("pool", 3), (1, 1), "tap", (1, 1), "tap", (1, 1), "tap"]
    else:
        two, three = [(1, 1), (1, 1), "tap", ("pool", 2)], [(1, 1), (1, 1), (1, 1), "tap", ("pool", 2)]
        plan = [*two, *two, *three, *three, *three]
    means, stds = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    pixels = np.stack([np.asarray(image, dtype=np.float64) / 127.5 - 1 for image in (first, second)])
    x = torch.tensor(((pixels - means) / stds).transpose(0, 3, 1, 2), dtype=torch.float32)
    total, taps = 0.0, 0
    for step in plan:
        if step == "tap":
            a, b = x.double().numpy()
            a, b = a / (np.sqrt((a**2).sum(0)) + 1e-10), b / (np.sqrt((b**2).sum(0)) + 1e-10)
            weight = linear[f"lin{taps}.model.1.weight"].double().numpy().ravel()
            total += np.einsum("c,chw->hw", weight, (a - b) ** 2).mean()
            taps += 1
        elif step[0] == "pool":
            x = functional.max_pool2d(x, step[1], 2)
        else:
            number = next(weights)
            x = functional.conv2d(
                x, trunk[f"features.{number}.weight"], trunk[f"features.{number}.bias"], *step
            ).relu()
    assert taps == 5
    return total


@pytest.mark.parametrize(("net", "trunk", "size"), [("alex", "alexnet", 64), ("vgg", "vgg16", 32)])
def test_against_the_formula(tmp_path, on_cpu, net, trunk, size):
    state, linear = save_trunk(tmp_path / "trunk.pth", trunk), save_linear(tmp_path / "linear.pth", net)
    metric = LPIPS(net, tmp_path / "trunk.pth", tmp_path / "linear.pth")
    images, originals = pictures(3, (size, size)), pictures(3, (size, size), seed=1)
    originals[1] = images[1]
    scores = metric.score(images, rows_of(3), originals)
    assert scores[1]["distance"] < 1e-9
    for i in (0, 2):
        expected = by_hand(net, state, linear, images[i], originals[i])
        assert scores[i]["distance"] == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert metric.values({}, scores[0]) == {"lpips": scores[0]["distance"]}
    json.dumps(metric.identity())


def test_sizes(tmp_path, on_cpu):
    save_trunk(tmp_path / "trunk.pth", "alexnet")
    save_linear(tmp_path / "linear.pth", "alex")
    plain = LPIPS("alex", tmp_path / "trunk.pth", tmp_path / "linear.pth")
    small = LPIPS("alex", tmp_path / "trunk.pth", tmp_path / "linear.pth", "esd")
    assert plain.identity() != small.identity()
    images, originals = pictures(2, (96, 128)), pictures(2, (96, 128), seed=1)
    squares = pictures(1, (64, 64), seed=2)
    mixed = small.score([images[0], *squares, images[1]], rows_of(3), [originals[0], squares[0], originals[1]])
    shrunk = [[image.resize((64, 85), Image.Resampling.BILINEAR) for image in side] for side in (images, originals)]
    expected = plain.score(shrunk[0], rows_of(2), shrunk[1])
    assert [mixed[0]["distance"], mixed[2]["distance"]] == pytest.approx([s["distance"] for s in expected], rel=1e-5)
    assert mixed[1]["distance"] < 1e-9
    with pytest.raises(ValueError, match="image 0 has 96 x 128 pixels, the original's 64 x 64"):
        plain.score(images[:1], rows_of(1), squares)


def test_what_is_missing_is_named(tmp_path):
    save_trunk(tmp_path / "trunk.pth", "alexnet")
    save_linear(tmp_path / "vgg.pth", "vgg")
    with pytest.raises(ValueError, match="lpips_trunk and lpips_linear; .*alexnet-owt-7be5be79.pth, and alex.pth"):
        LPIPS("alex", None, None)
    with pytest.raises(ValueError, match="lacks lpips_linear"):
        LPIPS("alex", tmp_path / "trunk.pth", None)
    with pytest.raises(ValueError, match="absent.pth: no such file; download torchvision's vgg16"):
        LPIPS("vgg", tmp_path / "absent.pth", tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="not alex.pth.*another shape of lin1.model.1.weight"):
        LPIPS("alex", tmp_path / "trunk.pth", tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="not torchvision's vgg16"):
        LPIPS("vgg", tmp_path / "trunk.pth", tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="alex, vgg"):
        LPIPS("squeeze", tmp_path / "trunk.pth", tmp_path / "vgg.pth")
