import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_safe.emoji.classifier import (
    HEADS,
    NOTHING,
    EmojiClassifier,
    SecondEmojiClassifier,
    scene_labels,
    to_tensor,
)
from diffusers_safe.emoji.recipe.judges import judge_batch, ruin
from diffusers_safe.emoji.render import render_many
from diffusers_safe.emoji.scenes import GROUPS, OBJECTS, STYLES


@pytest.fixture(scope="module")
def rendered():
    return render_many(0, 0, 10)


@pytest.fixture(params=[(EmojiClassifier, 8), (SecondEmojiClassifier, 12)], ids=["first", "second"])
def classifier(rendered, request):
    """An untrained classifier whose running statistics are not the initial ones."""
    kind, width = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = kind(width)
        classifier.train()
        with torch.no_grad():
            classifier(to_tensor(rendered[0]))
    return classifier.eval()


def test_a_saved_classifier_gives_the_same_logits(classifier, rendered, tmp_path):
    classifier.save_pretrained(tmp_path / "judge")
    loaded = EmojiClassifier.from_pretrained(tmp_path / "judge")
    assert type(loaded) is type(classifier) and not loaded.training
    with torch.no_grad():
        ours, theirs = classifier(to_tensor(rendered[0])), loaded(to_tensor(rendered[0]))
    for head in HEADS:
        torch.testing.assert_close(theirs[head], ours[head], rtol=0.02, atol=0.02)  # saved in half precision
    loaded.save_pretrained(tmp_path / "again")
    again = EmojiClassifier.from_pretrained(tmp_path / "again")
    assert again.classify(rendered[0]) == loaded.classify(rendered[0])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("judge", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {value.dtype for value in first.values()} <= {torch.float16, torch.int64}


def test_a_classifier_for_other_labels_is_refused(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["labels"]["object"][:2] = reversed(config["labels"]["object"][:2])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other labels"):
        EmojiClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3)])
def test_pictures_of_another_shape_are_refused(classifier, shape):
    with pytest.raises(ValueError) as error:
        classifier(torch.zeros(shape))
    assert str(shape) in str(error.value) and "(B, 3, 64, 64)" in str(error.value)


def test_classify_returns_the_largest_logit_for_any_batch_size(classifier, rendered):
    pictures = rendered[0]
    names = classifier.train().classify(pictures, batch_size=4)
    assert names == classifier.classify(pictures)
    assert names.keys() == HEADS.keys()
    with torch.no_grad():
        logits = classifier(to_tensor(pictures))
    for head, labels in HEADS.items():
        assert names[head] == [labels[row.argmax()] for row in logits[head]]
    assert classifier.classify(pictures[:0]) == {head: [] for head in HEADS}


def test_labels_are_those_of_the_scenes(rendered):
    scenes = rendered[1]
    labels = scene_labels(scenes)
    assert labels.keys() == HEADS.keys()
    for i, scene in enumerate(scenes):
        named = {head: HEADS[head][labels[head][i]] for head in HEADS}
        expected = (scene.name, scene.group, scene.style or "plain", scene.background)
        assert tuple(named.values()) == expected
    assert HEADS["object"] == [*OBJECTS, NOTHING] and HEADS["group"] == [*GROUPS, NOTHING]
    assert HEADS["style"] == ["plain", *STYLES]


def test_to_tensor(rendered):
    tensor = to_tensor(rendered[0])
    assert tensor.shape == (10, 3, 64, 64) and tensor.min() >= 0 and tensor.max() <= 1
    assert tensor[2, 1, 5, 7].item() == pytest.approx(rendered[0][2, 5, 7, 1] / 255)


def test_ruined_pictures_are_valid_and_depend_on_the_seed(rendered):
    pictures = to_tensor(rendered[0])
    shuffled = empty = 0
    for seed in range(40):
        before = pictures.clone()
        ruined, again = (ruin(pictures[0], pictures[1], np.random.default_rng(seed)) for _ in range(2))
        assert torch.equal(ruined, again) and torch.equal(pictures, before)
        assert ruined.shape == (3, 64, 64) and -1e-6 <= ruined.min() and ruined.max() <= 1 + 1e-6
        assert (ruined - pictures[0]).abs().mean() > 0.01
        shuffled += torch.equal(ruined.flatten(1).sort(dim=1).values, pictures[0].flatten(1).sort(dim=1).values)
        corners = pictures[0][:, ::63, ::63]
        low, high = corners.amin((1, 2), keepdim=True) - 1e-5, corners.amax((1, 2), keepdim=True) + 1e-5
        empty += bool(((low <= ruined) & (ruined <= high)).all())
    assert shuffled and empty


def test_ruined_pictures_have_no_object_in_a_batch_of_the_judge():
    batch = judge_batch(np.random.default_rng(0), 40, ("noto", "twemoji", "fluent"))
    again = judge_batch(np.random.default_rng(0), 40, ("noto", "twemoji", "fluent"))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch["pictures"].shape == (40, 3, 64, 64) and 0 <= batch["pictures"].min() <= batch["pictures"].max() <= 1
    ruined = batch["object"] == HEADS["object"].index(NOTHING)
    assert ruined.sum() == 6 and torch.equal(batch["group"] == HEADS["group"].index(NOTHING), ruined)
    assert torch.equal(batch["style"] == -1, ruined) and torch.equal(batch["background"] == -1, ruined)
