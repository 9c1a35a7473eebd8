"""FID and KID against closed forms, scipy and torchmetrics; the way from folders to numbers."""

import json

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffusers_safe.generation.manifest import MANIFEST
from diffusers_safe.metrics.fid import FID, RESIZES, Extractor, Gaussian, kernel_distances, unpacked
from diffusers_safe.metrics.scores import score_images
from metric_models import generated_folder, pictures, rows_of


def features_of(count, width=6, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + shift).astype(np.float32)


class Given(torch.nn.Module):
    """Features that are their own."""

    num_features = 6

    def forward(self, features):
        return features


def by_sqrtm(first, second):
    (m1, s1), (m2, s2) = ((x.astype(float).mean(0), np.cov(x.astype(float), rowvar=False)) for x in (first, second))
    return ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)


@pytest.mark.parametrize(("n", "m"), [(200, 300), (7, 300), (200, 7)])
def test_frechet_distance_against_scipy_and_torchmetrics(on_cpu, n, m):
    first, second = features_of(n), features_of(m, seed=1, shift=0.5)
    distance = Gaussian.of(first).distance(Gaussian.of(second))
    assert distance == pytest.approx(by_sqrtm(first, second), rel=1e-6)
    other = FrechetInceptionDistance(Given())
    other.update(torch.from_numpy(second), real=True)
    other.update(torch.from_numpy(first), real=False)
    assert distance == pytest.approx(float(other.compute()), rel=1e-4)


def test_frechet_distance_where_it_is_known(on_cpu):
    line = features_of(50, width=1)
    moved = Gaussian.of(3 * line + 2)
    m, s = float(line.mean(dtype=float)), float(line.std(ddof=1, dtype=float))
    assert Gaussian.of(line).distance(moved) == pytest.approx((2 * m + 2) ** 2 + (2 * s) ** 2, rel=1e-5)
    few = features_of(4, width=40)  # far from spanning a covariance
    assert Gaussian.of(few).distance(Gaussian.of(few)) == pytest.approx(0, abs=1e-9)
    assert Gaussian.of(few).distance(Gaussian.of(few + 1)) == pytest.approx(40, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kernel_distance_against_torchmetrics():
    first, second = features_of(40), features_of(60, seed=1, shift=0.5)
    other = KernelInceptionDistance(Given(), subsets=1, subset_size=40)
    other.update(torch.from_numpy(second[:40]).double(), real=True)
    other.update(torch.from_numpy(first).double(), real=False)
    assert kernel_distances(first, second[:40], 1, 40) == pytest.approx(float(other.compute()[0]), rel=1e-6)
    # without bias: over subsets the mean is that of all pairs
    subsets = kernel_distances(first, second, 4000, 10)
    x, y = first.astype(float), second.astype(float)
    k = [(a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    whole = [(k[i].sum() - np.trace(k[i])) / (n * (n - 1)) for i, n in ((0, 40), (1, 60))]
    assert subsets.mean() == pytest.approx(sum(whole) - 2 * k[2].mean(), abs=4 * subsets.std() / 4000**0.5)
    with pytest.raises(ValueError, match="between 2 and 40"):
        kernel_distances(first, second, 1, 41)


def test_the_interval_of_the_kid_is_as_wide_as_repeating_shows(on_cpu, tmp_path):
    generated_folder(tmp_path, pictures(60, (4, 4)))
    values, reaches = [], []
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        metric = FID(Extractor("given", {}, np.stack), tmp_path, subsets=30, subset_size=30, samples=2)
        metric.reference_features = rng.normal(1.0, 1.0, (60, 3))
        metric.update(rows_of(60), metric.score(list(rng.normal(size=(60, 3))), rows_of(60)))
        kid = metric.compute()["kid"]
        values.append(kid.value)
        reaches.append((kid.high - kid.value) / 1.96)
        assert kid.high - kid.value == pytest.approx(kid.value - kid.low)
    assert np.mean(reaches) == pytest.approx(np.std(values), rel=0.35)


class Colors:
    """An extractor that counts what it saw."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return np.stack([np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images])


def test_from_folders_to_numbers(tmp_path, on_cpu):
    images, real = pictures(12, (8, 8)), pictures(10, (8, 8), seed=1)
    rows = generated_folder(tmp_path / "generated", images)
    (tmp_path / "real" / "deep").mkdir(parents=True)
    for i, image in enumerate(real):
        image.save(tmp_path / "real" / ("deep" if i % 2 else ".") / f"{i}.png")
    colors = Colors()
    metric = FID(Extractor("colors", {"network": "colors"}, colors), tmp_path / "real", samples=20)
    scores = score_images(metric, tmp_path / "generated", rows)
    metric.update(rows, scores)
    fid, kid = metric.compute().values()
    first, second = Colors()(images), Colors()(real)
    assert np.array_equal(unpacked(scores), first)
    assert fid.value == pytest.approx(by_sqrtm(first, second), rel=1e-6)
    assert fid.low < fid.value < fid.high and kid.low < kid.value < kid.high and fid.n == 12
    assert colors.seen == 22 and metric.compute() == {"fid": fid, "kid": kid}
    again = FID(metric.extractor, tmp_path / "real", samples=20)
    again.update(rows, score_images(again, tmp_path / "generated", rows))
    assert again.compute()["fid"] == fid and colors.seen == 22  # features are kept, on both sides
    details = metric.details()
    assert details["references"] == {"folder": "real", "images": 10}  # of nobody's machine
    assert details["kid_subset_size"] == 5 and "same N" in details["note"]
    json.dumps([metric.identity(), details])


def test_references_may_be_another_models_images(tmp_path, on_cpu):
    images = pictures(8, (8, 8))
    rows = generated_folder(tmp_path / "a", images)
    (tmp_path / "a" / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures(1)[0].save(tmp_path / "a" / "of no row.png")
    metric = FID(Extractor("colors", {}, Colors()), tmp_path / "a", samples=3)
    metric.update(rows, score_images(metric, tmp_path / "a", rows))
    assert metric.compute()["fid"].value == pytest.approx(0, abs=1e-6)
    assert metric.details()["references"]["images"] == 8


def test_prompts_with_several_images_are_drawn_whole(tmp_path, on_cpu):
    real = generated_folder(tmp_path / "real", pictures(8, (8, 8), seed=9))
    assert len(real) == 8
    images = [image for image in pictures(6, (8, 8)) for _ in range(4)]
    intervals = []
    for prompts in ([f"prompt {i // 4}" for i in range(24)], [f"prompt {i}" for i in range(24)], ["one prompt"] * 24):
        rows = rows_of(24, prompts)
        metric = FID(Extractor("colors", {}, Colors()), tmp_path / "real", samples=60)
        metric.update(rows, metric.score(images, rows))
        fid = metric.compute()["fid"]
        intervals.append(fid.high - fid.low)
    assert intervals[0] > 1.3 * intervals[1] > 0  # four copies of an image are no four images
    assert intervals[2] == pytest.approx(intervals[1])


def test_what_is_wrong_is_named(tmp_path, on_cpu):
    colors = Extractor("colors", {}, Colors())
    with pytest.raises(ValueError, match="fid_references: none given"):
        FID(colors, None)
    with pytest.raises(ValueError, match="no such folder"):
        FID(colors, tmp_path / "absent")
    generated_folder(tmp_path, pictures(3))
    with pytest.raises(ValueError, match="3 images; needs 4"):
        FID(colors, tmp_path)
    generated_folder(tmp_path, pictures(4))
    with pytest.raises(ValueError, match="fid: 3 images; needs at least 4"):
        FID(colors, tmp_path).check(rows_of(3))
    with pytest.raises(ValueError, match="kid_subset_size 1: must be at least 2"):
        FID(colors, tmp_path, subset_size=1)
    flat = FID(Extractor("flat", {}, lambda images: np.zeros(len(images))), tmp_path)
    with pytest.raises(ValueError, match="flat gives no finite"):
        flat.score(pictures(2), rows_of(2))
    metric = FID(colors, tmp_path)
    metric.update(rows_of(3), metric.score(pictures(3), rows_of(3)))
    with pytest.raises(ValueError, match="3 images; needs at least 4"):
        metric.compute()


def test_resizes():
    image = pictures(1, (512, 400))[0]
    tensors = {name: resize(image) for name, (resize, _) in RESIZES.items()}
    assert {tensor.shape for tensor in tensors.values()} == {(3, 299, 299)}
    values = np.asarray(image, dtype=np.float64).transpose(2, 0, 1)
    # without antialiasing a pixel is made of its four neighbours
    y, x = (100 + 0.5) * 400 / 299 - 0.5, (200 + 0.5) * 512 / 299 - 0.5
    top, left, dy, dx = int(y), int(x), y % 1, x % 1
    corners = values[:, top : top + 2, left : left + 2]
    expected = np.einsum("chw,h,w->c", corners, [1 - dy, dy], [1 - dx, dx])
    assert tensors["pytorch-fid"][:, 100, 200].numpy() == pytest.approx(expected, abs=1e-2)
    # antialiasing takes noise away
    assert tensors["torchmetrics"].std() < 0.9 * tensors["pytorch-fid"].std()
    assert tensors["clean"].min() < tensors["clean"].round().min() + 1 and (tensors["clean"] % 1).any()
    small = image.resize((256, 256), 3)
    assert torch.equal(tensors["bk-sdm"], RESIZES["pytorch-fid"][0](small))
