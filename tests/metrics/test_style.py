import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from diffusers_safe.metrics.style import GramDistance
from metric_models import pictures, rows_of, save_trunk


@pytest.fixture(scope="module")
def vgg19(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    return path, save_trunk(path, "vgg19")


def loss_by_hand(state, first, second):
    """Place by place: a Gram matrix is a sum of outer products over places."""
    grams = []
    for image in (first, second):
        pixels = (np.asarray(image, dtype=np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        x, found = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32), []
        for number in (0, 2, 5, 7, 10):
            if number in (5, 10):
                x = functional.max_pool2d(x, 2, 2)
            x = functional.conv2d(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1)
            features = x[0].double().numpy()
            found.append(np.einsum("chw,dhw->cd", features, features) / features.size)
            x = x.relu()
        grams.append(found)
    return sum(((a - b) ** 2).mean() for a, b in zip(*grams))


def test_to_the_original(vgg19, on_cpu):
    path, state = vgg19
    metric = GramDistance(path, resize="none")
    images, originals = pictures(2, (24, 16)), pictures(2, (24, 16), seed=1)
    assert metric.compares
    scores = metric.score([*images, images[0]], rows_of(3), [*originals, images[0]])
    for score, image, original in zip(scores, images, originals):
        assert score["loss"] == pytest.approx(loss_by_hand(state, image, original), rel=1e-4)
        assert metric.values({}, score)["gram"] == 1e6 * score["loss"]
    assert scores[2]["loss"] < 1e-9


def test_to_references_it_is_the_average_over_them(vgg19, tmp_path, on_cpu):
    path, state = vgg19
    references = pictures(3, (16, 16), seed=2)
    for i, image in enumerate(references):
        image.save(tmp_path / f"{i}.png")
    metric = GramDistance(path, tmp_path, resize="none")
    assert not metric.compares
    image = pictures(1, (16, 24))[0]
    expected = np.mean([loss_by_hand(state, image, reference) for reference in references])
    assert metric.score([image], rows_of(1))[0]["loss"] == pytest.approx(expected, rel=1e-4)
    identity = metric.identity()
    references[0].save(tmp_path / "3.png")
    assert GramDistance(path, tmp_path, resize="none").identity() != identity


def test_esd_shrinks_the_shorter_side(vgg19):
    path, _ = vgg19
    image = Image.new("RGB", (600, 1000))
    assert GramDistance(path).resize(image).shape == (3, 853, 512)
    assert GramDistance(path, resize="none").resize(image).shape == (3, 1000, 600)


def test_what_is_missing_is_named(vgg19, tmp_path):
    with pytest.raises(ValueError, match="style_trunk: none given; download torchvision's vgg19"):
        GramDistance(None)
    with pytest.raises(ValueError, match="style_references .*: holds no images"):
        GramDistance(vgg19[0], tmp_path)
    with pytest.raises(ValueError, match="gram_resize 'sdd': unknown; allowed are esd, none"):
        GramDistance(vgg19[0], resize="sdd")
