"""Raw scores stay with the bytes of their images."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusers_safe.generation.manifest import save_png
from diffusers_safe.metrics.base import Metric, Quantity
from diffusers_safe.metrics.pixel_distance import PixelDistance
from diffusers_safe.metrics.scores import score_images


class Redness(Metric):
    name = "redness"
    quantities = {"red": Quantity("red", "%")}

    def __init__(self, version=1):
        super().__init__()
        self.version, self.seen = version, []

    def identity(self):
        return {"version": self.version}

    def score(self, images, rows, originals=None):
        self.seen += [row["id"] for row in rows]
        return [{"red": image.getpixel((0, 0))[0]} for image in images]

    def values(self, row, score):
        return {"red": float(score["red"] > 128)}


def folder_of(path, reds, prompts=None):
    path.mkdir(exist_ok=True)
    return [
        {"id": str(i), "prompt": (prompts or "abcdefgh")[i], "seed": i, "labels": {}}
        | save_png(path, f"{i}.png", Image.new("RGB", (8, 8), (red, 0, 0)))
        for i, red in enumerate(reds)
    ]


def test_a_pass_that_was_stopped_goes_on_and_others_follow_the_bytes(tmp_path):
    rows = folder_of(tmp_path, [0, 200, 255, 10])
    metric = Redness()
    assert score_images(metric, tmp_path, rows[:2], batch_size=1) == [{"red": 0}, {"red": 200}]
    path = next((tmp_path / "scores").iterdir())
    path.write_bytes(path.read_bytes() + b'{"id": "2", "sha')  # a kill
    assert [score["red"] for score in score_images(metric, tmp_path, rows, batch_size=3)] == [0, 200, 255, 10]
    assert metric.seen == ["0", "1", "2", "3"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"identity": {"version": 1}} and len(lines) == 5

    rows[1] = folder_of(tmp_path, [0, 100])[1]  # generated anew
    score_images(metric, tmp_path, rows)
    assert metric.seen[4:] == ["1"]
    score_images(Redness(2), tmp_path, rows)
    assert len(list((tmp_path / "scores").iterdir())) == 2


def test_shares_have_wilson_intervals_and_prompts_with_several_images_the_bootstrap(tmp_path):
    for prompts, same in (("abcd", False), ("aabb", True)):
        rows = folder_of(tmp_path, [0, 0, 255, 255], prompts)
        metric = Redness()
        metric.update(rows, score_images(metric, tmp_path, rows))
        red = metric.compute()["red"]
        assert red.value == 0.5 and red.n == 4
        assert (red.low == 0.0) == same
    metric.reset()
    with pytest.raises(ValueError, match="no images"):
        metric.compute()


def test_comparing_metrics_find_the_original_of_each_image(tmp_path):
    before, after = (folder_of(tmp_path / name, reds) for name, reds in (("a", [0, 255]), ("b", [255, 255])))
    metric = PixelDistance()
    scores = score_images(metric, tmp_path / "b", after, (tmp_path / "a", before[::-1]))
    assert [score["distance"] for score in scores] == pytest.approx([1 / 3, 0])
    with pytest.raises(ValueError, match="original has no image 1"):
        score_images(metric, tmp_path / "b", after, (tmp_path / "a", before[:1]))
    with pytest.raises(ValueError, match="has another seed"):
        score_images(metric, tmp_path / "b", after, (tmp_path / "a", [row | {"seed": 9} for row in before]))
    with pytest.raises(ValueError, match="there are none"):
        score_images(metric, tmp_path / "b", after)
    with pytest.raises(ValueError, match="image 1 has 8 x 8 pixels, the original's 16 x 16"):
        images = [Image.new("RGB", (size, size)) for size in (8, 8, 16)]
        metric.score(images[:2], after, images[::2])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([{"red": float("nan")}] * 2, "redness: its score of image 0 cannot be written as JSON"),
        ([{"red": np.float32(1)}] * 2, "redness: its score of image 0 cannot be written as JSON"),
        ([{"red": 1}], "redness: gives 1 scores of 2 images"),
    ],
)
def test_scores_of_a_metric_that_errs_are_told_and_not_kept(tmp_path, monkeypatch, scores, message):
    rows, metric = folder_of(tmp_path, [0, 1]), Redness()
    monkeypatch.setattr(metric, "score", lambda images, rows, originals: scores)
    with pytest.raises(ValueError, match=message):
        score_images(metric, tmp_path, rows)
    assert score_images(Redness(), tmp_path, rows) == [{"red": 0}, {"red": 1}]


def test_broken_scores_and_images(tmp_path):
    rows = folder_of(tmp_path, [0, 1])
    score_images(Redness(), tmp_path, rows)
    path = next((tmp_path / "scores").iterdir())
    whole = path.read_bytes()
    for broken in (b"{}\n", b"\xff\n", b"[]\n", b'{"id": "0", "sha256": "caf\xc3'):
        path.write_bytes(whole + broken)
        assert score_images(Redness(), tmp_path, rows) == [{"red": 0}, {"red": 1}]
        assert path.read_bytes() == whole
    path.write_bytes(b"\xff\n" + whole.split(b"\n", 2)[1][:-1] + b"\n")  # nothing of it is left: scored again
    assert score_images(Redness(), tmp_path, rows) == [{"red": 0}, {"red": 1}]
    assert path.read_bytes() == whole
    path.unlink()
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="damaged"):
        score_images(Redness(), tmp_path, rows)
    with pytest.raises(ValueError, match="no images"):
        score_images(Redness(), tmp_path, [])
