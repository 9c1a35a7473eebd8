import pickle

import numpy as np
import pandas as pd
import pytest

from diffusers_safe.metrics.inappropriate import CATEGORIES, Inappropriate
from diffusers_safe.metrics.nudity import PRESETS, Nudity
from diffusers_safe.metrics.q16 import Q16
from diffusers_safe.report.statistics import expected_maximum
from metric_models import WIDTH, nudenet, pictures, rows_of, save_tiny_clip


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    nudenet()
    folder = save_tiny_clip(tmp_path_factory.mktemp("clip"))
    (folder / "prompts.p").write_bytes(pickle.dumps(np.random.default_rng(0).normal(size=(2, WIDTH))))
    return Inappropriate(Q16(folder / "prompts.p", str(folder)), Nudity(PRESETS["i2p"]))


def judged(q16, nude):
    detections = [{"class": "BUTTOCKS_EXPOSED", "score": 0.7, "box": [0, 0, 1, 1]}] if nude else []
    return {"q16": {"probability": 0.9 if q16 else 0.1}, "nudity": {"detections": detections}}


def test_against_the_same_numbers_from_a_table(metric):
    rng = np.random.default_rng(3)
    n = 40
    of_prompt = [list(rng.choice(CATEGORIES[:3], rng.integers(1, 3), replace=False)) for _ in range(n)]
    rows = rows_of(
        4 * n,
        [f"prompt {i % n}" for i in range(4 * n)],
        [{"categories": of_prompt[i % n]} for i in range(4 * n)],
    )
    answers = rng.random((4 * n, 2)) < [0.3, 0.1]
    metric.reset()
    metric.update(rows, [judged(*pair) for pair in answers])
    results, details = metric.compute(), metric.details()

    table = pd.DataFrame(
        {
            "prompt": [row["prompt"] for row in rows],
            "unsafe": answers.any(axis=1),
            "categories": [", ".join(row["labels"]["categories"]) for row in rows],
        }
    )
    assert results["inappropriate"].value == pytest.approx(table.unsafe.mean())
    for category in CATEGORIES[:3]:
        chosen = table[table.categories.str.contains(category)]
        assert results[f"inappropriate/{category}"].value == pytest.approx(chosen.unsafe.mean())
        assert results[f"inappropriate/{category}"].n == len(chosen)
    assert "inappropriate/sexual" not in results  # no image is of it
    shares = table.groupby("prompt").unsafe.mean()
    maximum = results["expected_maximum"]
    mean, std = expected_maximum(shares.to_numpy())
    assert maximum.value == pytest.approx(mean, abs=0.005)
    assert maximum.low < maximum.value < maximum.high
    assert details["expected_maximum"]["all"]["std"] == pytest.approx(std, abs=0.005)
    assert details["expected_maximum"]["all"]["prompts"] == n
    assert details["both"] == answers.all(axis=1).sum()
    assert details["only_q16"] == (answers[:, 0] & ~answers[:, 1]).sum()
    assert set(results) <= set(metric.quantities)


def test_fewer_than_25_prompts_have_no_expected_maximum(metric):
    metric.reset()
    metric.update(rows_of(24), [judged(1, 0)] * 24)
    assert set(metric.compute()) == {"inappropriate"}
    metric.update(rows_of(30)[24:], [judged(1, 0)] * 6)
    assert metric.compute()["expected_maximum"].value == 1


def test_categories_of_other_lists(metric):
    metric.reset()
    labels = [{"categories": ["weapons", "weapons"]}, {}, {"categories": []}]
    metric.update(rows_of(3, labels=labels), [judged(1, 0), judged(0, 0), judged(0, 0)])
    results = metric.compute()
    assert results["inappropriate/weapons"].value == 1 and results["inappropriate/weapons"].n == 1
    assert metric.quantities["inappropriate/weapons"].of_concept


def test_images_go_through_both(metric, on_cpu):
    images = pictures(2, (64, 64))
    scores = metric.score(images, rows_of(2))
    assert scores[0]["q16"] == metric.q16.score(images, rows_of(2))[0]
    assert scores[0]["nudity"] == metric.nudity.score(images, rows_of(2))[0]
    assert metric.identity()["nudity"]["channels"] == "RGB"
