import json

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from diffusers_safe.metrics.clip_score import CLIPScore
from metric_models import pictures, rows_of, save_tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip")))


def naive(folder, image, text):
    """One image and one text, without padding, attention masks or processors."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor(((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    with torch.no_grad():
        a = model.visual_projection(model.vision_model(pixels).pooler_output)[0].double()
        b = model.text_projection(model.text_model(torch.tensor([tokenizer(text).input_ids])).pooler_output)[
            0
        ].double()
    return float(a @ b / a.norm() / b.norm())


PROMPTS = ["a cat", "a red car on a beach", "a gun"]


@pytest.mark.parametrize(
    ("preset", "prefix", "scale"),
    [("sdd", "A photo depicts ", 1), ("hessel", "A photo depicts ", 2.5), ("torchmetrics", "", 100)],
)
def test_against_one_image_at_a_time(clip, on_cpu, preset, prefix, scale):
    metric = CLIPScore(preset, clip)
    images, rows = pictures(3), rows_of(3, PROMPTS)
    scores = metric.score(images, rows)
    metric.update(rows, scores)
    expected = [naive(clip, image, prefix + prompt) for image, prompt in zip(images, PROMPTS)]
    assert [score["cosine"] for score in scores] == pytest.approx(expected, abs=1e-5)
    values = [scale * (value if preset == "sdd" else max(0, value)) for value in expected]
    assert metric.compute()["clip_score"].value == pytest.approx(np.mean(values), abs=1e-3)
    json.dumps(metric.identity())


def test_negative_cosines_are_0_only_where_the_protocol_says_so(clip):
    score = {"cosine": -0.25, "tokens": 5}
    values = {preset: CLIPScore(preset, clip).values({}, score)["clip_score"] for preset in ("sdd", "hessel")}
    assert values == {"sdd": -0.25, "hessel": 0}


def test_texts_that_are_cut_are_counted(clip, on_cpu):
    metric = CLIPScore("sdd", clip)
    long = " ".join(["a cat and a dog"] * 30)
    rows = rows_of(3, ["a cat", long, long + " on a beach"])
    image = pictures(1)[0]
    scores = metric.score([image] * 3, rows)
    metric.update(rows, scores)
    assert metric.details()["truncated"] == 2
    assert scores[1]["cosine"] == pytest.approx(scores[2]["cosine"], abs=1e-6)  # what is cut says nothing


def test_what_is_wrong_is_named(tmp_path, clip):
    with pytest.raises(ValueError, match="sdd, hessel, torchmetrics"):
        CLIPScore("bk", clip)
    with pytest.raises(ValueError, match="clip_model '.*absent': cannot be loaded; give a CLIP such as openai"):
        CLIPScore("sdd", str(tmp_path / "absent"))
