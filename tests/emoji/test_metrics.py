"""The judge's measures against a direct computation."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_safe.emoji import CLASSIFIER_FOLDER
from diffusers_safe.emoji.classifier import EmojiClassifier
from diffusers_safe.emoji.metrics import EmojiDistance, EmojiFID, EmojiRecognition, write_references
from diffusers_safe.emoji.render import render_many


@pytest.fixture(scope="module")
def renders():
    pictures, scenes = render_many(5, 0, 60, hold_out=False)
    return [Image.fromarray(picture) for picture in pictures], scenes


def row(part, subject, **labels):
    return {
        "id": f"{part}-{subject}",
        "prompt": f"a {subject}",
        "labels": {"part": part, "subject": subject, **labels},
    }


def test_recognition_counts_what_the_judge_names(renders):
    images, scenes = renders
    names = EmojiClassifier.from_pretrained(CLASSIFIER_FOLDER).classify(np.stack(images))
    rows = [row("erased" if scene.group == "weapon" else "object", scene.name) for scene in scenes]
    rows = [{**each, "id": number, "prompt": str(number)} for number, each in enumerate(rows)]  # each counts alike
    place = next(number for number, scene in enumerate(scenes) if scene.group == "fruit")
    rows[place] = {**row("group", "fruit"), "id": place}
    metric = EmojiRecognition(["knife", "gun"])
    scores = metric.score(images, rows)
    assert [score["object"] for score in scores] == names["object"]
    metric.update(rows, scores)
    estimates = metric.compute()
    weapons = [name in ("knife", "gun") for name, scene in zip(names["object"], scenes) if scene.group == "weapon"]
    assert estimates["concept"].value == pytest.approx(np.mean(weapons))
    assert estimates["groups"].n == 1 and estimates["others"].n == 59 - len(weapons) and "styles" not in estimates
    assert estimates["others"].value > 0.9 and estimates["alignment"].n == 60 - len(weapons)
    assert sum(metric.details()["seen on erased prompts"].values()) == len(weapons)


def test_the_probability_of_a_group_is_that_of_its_members(renders):
    images, scenes = renders
    judge = EmojiClassifier.from_pretrained(CLASSIFIER_FOLDER)
    fruit = next(number for number, scene in enumerate(scenes) if scene.group == "fruit")
    asked = [metric_row["asked"] for metric_row in EmojiRecognition(["knife"], judge=judge).score(
        [images[fruit]] * 2, [row("group", "fruit"), row("object", scenes[fruit].name)])]  # fmt: skip
    assert 1 >= asked[0] >= asked[1] > 0.5


def test_a_style_is_judged_by_the_style_head(renders):
    images, scenes = renders
    rows = [
        row("style" if scene.style else "object", scene.name, style=scene.style)
        if scene.style != "sketch"
        else row("erased", scene.name, style="sketch")
        for scene in scenes
    ]
    metric = EmojiRecognition([], style="sketch")
    metric.update(rows, metric.score(images, rows))
    estimates = metric.compute()
    assert estimates["concept"].value > 0.9 and estimates["styles"].value > 0.9


def test_distance_by_hand(renders):
    images, scenes = renders
    metric = EmojiDistance()
    rows = [row("object", "cat"), row("erased", "knife")]
    scores = metric.score(images[:2], rows, [images[0], images[2]])
    assert scores[0]["distance"] < 1e-9
    sides = [torch.from_numpy(np.array(images[number])).permute(2, 0, 1)[None].float() / 255 for number in (1, 2)]
    expected, hidden = [], [2 * side - 1 for side in sides]
    for level in range(4):
        hidden = [metric.judge.stem[6 * level : 6 * level + 6](side) for side in hidden]
        a, b = (side / side.pow(2).sum(1, keepdim=True).sqrt().clamp_min(1e-10) for side in hidden)
        expected.append((2 - 2 * (a * b).sum(1) - (2 - a.pow(2).sum(1) - b.pow(2).sum(1))).mean().item())
    assert scores[1]["distance"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert metric.values(rows[1], scores[1]) == {} and metric.values(rows[0], scores[0]) == {"distance": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"erased": []}, "give objects or a style"),
        ({"erased": ["cat"], "style": "sketch"}, "give objects or a style"),
        ({"erased": ["unicorn"]}, "erased unicorn: unknown"),
        ({"erased": [], "style": "gothic"}, "style gothic: unknown"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmojiRecognition(**arguments)


def test_prompts_of_no_emoji_are_refused_before_any_work():
    with pytest.raises(ValueError, match="image a lacks the label part of emoji's prompts"):
        EmojiRecognition(["knife"]).check([{"id": "a", "labels": {"subject": "knife"}}])


def test_images_of_anybodys_prompts_are_compared_too():
    assert EmojiDistance().values({"labels": {}}, {"distance": 0.5}) == {"distance": 0.5}


def test_too_few_images_of_what_stays_are_told_before_any_is_scored(tmp_path):
    references = write_references(tmp_path / "references", ["knife"], count=4)
    rows = [row("erased", "knife")] * 9 + [row("object", "cat")] * 3
    with pytest.raises(ValueError, match="emoji_fid: 3 images; needs at least 4"):
        EmojiFID(references).check(rows)
