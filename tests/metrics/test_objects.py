import json

import numpy as np
import pytest
import torch
from transformers import ResNetForImageClassification

from diffusers_safe.metrics.objects import Classification
from diffusers_safe.metrics.scores import score_images
from metric_models import pictures, rows_of, save_tiny_clip, save_tiny_resnet


CLASSES = [
    "tench, Tinca tinca",
    "chain saw, chainsaw",
    "crane",
    "church, church building",
    "crane",
    "French horn, horn",
    "golf ball",
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return str(save_tiny_resnet(tmp_path_factory.mktemp("resnet"), CLASSES))


def test_first_and_first_five_against_the_logits(classifier, on_cpu):
    metric = Classification(classifier, "class")
    images = pictures(24, (40, 36))
    names = ["golf_ball", "Chainsaw", "french horn", 2] * 6
    rows = rows_of(24, labels=[{"class": name} for name in names])
    scores = metric.score(images, rows)
    metric.update(rows, scores)

    # ConvNeXT's way for 32 pixels: the shorter side to int(32 / 0.875), then the middle
    model, numbers = ResNetForImageClassification.from_pretrained(classifier), [6, 1, 5, 2] * 6
    first, five = [], []
    for image, number in zip(images, numbers):
        image = image.resize((40, 36), 3)
        pixels = np.asarray(image, dtype=np.float32)[2:34, 4:36] / 255
        pixels = torch.tensor((pixels - 0.5) / 0.5).permute(2, 0, 1)[None]
        with torch.no_grad():
            order = model.eval()(pixels).logits[0].argsort(descending=True).tolist()
        first.append(order[0] == number)
        five.append(number in order[:5])
    results = metric.compute()
    assert results["objects_top1"].value == pytest.approx(np.mean(first))
    assert results["objects_top5"].value == pytest.approx(np.mean(five))
    assert 0 < np.mean(five) and len({tuple(score["classes"]) for score in scores}) > 1
    details = metric.details()["classes"]
    assert details["Chainsaw"] == {"images": 6, "top1": sum(first[1::4]), "top5": sum(five[1::4])}
    assert json.dumps(metric.identity())


def test_names_of_classes(classifier):
    metric = Classification(classifier, "class")
    names = ["tench", "Tinca tinca", "Tench, tinca tinca", "chain_saw", "church building", 4]
    assert [metric.number(name) for name in names] == [0, 0, 0, 1, 3, 4]
    with pytest.raises(ValueError, match="similar: .*golf ball"):
        metric.number("golf bal")
    with pytest.raises(ValueError, match="classes 2, 4; give the number"):
        metric.number("crane")


def test_labels_are_checked_before_the_first_image(classifier, tmp_path):
    metric = Classification(classifier, "class")
    with pytest.raises(ValueError, match="no image has this label; they have artist"):
        metric.check(rows_of(2, labels=[{"artist": "Van Gogh"}, {}]))
    rows = rows_of(2, labels=[{"class": "tench"}, {"class": "trench"}])
    with pytest.raises(ValueError, match="'trench'.*similar: .*tench"):
        score_images(metric, tmp_path, [row | {"file": "absent.png", "sha256": ""} for row in rows])
    assert metric.values({"labels": {}}, {"classes": [0]}) == {}


def test_what_was_erased_is_counted_apart(classifier):
    metric = Classification(classifier, "class", erased=["church"])
    rows = rows_of(4, labels=[{"class": name} for name in ("church", "church", "tench", "golf ball")])
    metric.check(rows)
    metric.update(rows, [{"classes": classes} for classes in ([3, 0], [0, 3], [0, 3], [3, 6])])
    found = {name: (estimate.value, estimate.n) for name, estimate in metric.compute().items()}
    assert found == {"objects_erased": (0.5, 2), "objects_top1": (0.5, 2), "objects_top5": (1, 2)}
    quantities = metric.quantities
    assert quantities["objects_erased"].of_concept and quantities["objects_erased"].better == "lower"
    assert quantities["objects_top1"].better == "higher" and metric.details()["erased"] == ["church"]
    assert metric.details()["classes"]["church"] == {"images": 2, "top1": 1, "top5": 2}
    with pytest.raises(ValueError, match="objects_erased 'church': no image asks for it"):
        metric.check(rows[2:])
    with pytest.raises(ValueError, match="objects 'spoon': none of the 7 classes"):
        Classification(classifier, "class", erased=["spoon"])


def test_the_same_class_judges_styles(classifier):
    metric = Classification(classifier, "artist", "style")
    assert metric.name == "style" and list(metric.quantities) == ["style_top1", "style_top5"]
    row = {"labels": {"artist": "tench", "class": "crane"}}
    assert metric.values(row, {"classes": [3, 0]}) == {"style_top1": 0, "style_top5": 1}
    assert metric.seen(row, {"classes": [0, 3]}) == "tench" and metric.seen({"labels": {}}, {"classes": [0]}) == ""
    assert metric.identity() != Classification(classifier, "class").identity()


def test_a_model_must_be_named_and_be_a_classifier(tmp_path):
    with pytest.raises(ValueError, match="objects_model: none given; give an image classifier"):
        Classification(None, "class")
    save_tiny_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="clip': is not an image classifier.*lacks weights such as classifier"):
        Classification(str(tmp_path / "clip"), "class")
    with pytest.raises(ValueError, match="style_model '.*absent': cannot be loaded"):
        Classification(str(tmp_path / "absent"), "artist", "style")
