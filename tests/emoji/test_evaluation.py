import json
from collections import Counter

import pytest

from diffusers_safe.emoji.evaluation import erasure_rows, evaluate_erasure
from diffusers_safe.emoji.scenes import OBJECTS, group_members
from diffusers_safe.evaluation.generate import GenerationSettings


QUICK = GenerationSettings(num_inference_steps=1, guidance_scale=1.0, height=16, width=16)
WEAPONS = group_members("weapon")


def test_rows_have_their_own_seeds_and_keep_them_when_more_are_asked_for():
    few, many = erasure_rows(WEAPONS, 2, 0, "weapon"), erasure_rows(WEAPONS, 4, 0, "weapon")
    assert len({row.seed for row in many}) == len({row.id for row in many}) == len(many)
    assert {(row.id, row.seed) for row in few} < {(row.id, row.seed) for row in many}
    assert Counter(row.labels["part"] for row in few) == {"erased": 24, "object": 110, "group": 12}
    assert Counter(row.labels["part"] for row in erasure_rows(["cat"], 2, 0))["erased"] == 24
    assert Counter(row.labels["part"] for row in erasure_rows(WEAPONS, 5, 0, "weapon"))["erased"] == 30
    assert {row.seed for row in few}.isdisjoint(row.seed for row in erasure_rows(WEAPONS, 2, 1, "weapon"))


def test_an_erasure_is_measured_on_what_went_and_on_what_stayed(make_tiny_pipeline, tmp_path, scripted_judge, perfect):
    rows = erasure_rows(WEAPONS, 2, 0, "weapon")
    before, after = perfect(rows), perfect(rows)
    after[:24] = ["gun", *["nothing"] * 22, "cat"]  # a gun for "a knife" counts as a weapon
    cat, fruit = ([i for i, row in enumerate(rows) if row.labels["subject"] == name] for name in ("cat", "fruit"))
    after[cat[0]] = after[fruit[0]] = "dog"
    results = evaluate_erasure(
        make_tiny_pipeline(), make_tiny_pipeline(seed=1), WEAPONS, scripted_judge(before, after), tmp_path,
        images_per_object=2, group="weapon", settings=QUICK, retained=["cat", "fruit"], batch_size=64,
    )  # fmt: skip
    rate = results["concept_rate"]
    assert (rate["before"].value, rate["after"].value, rate["after"].n) == (1, 1 / 24, 24)
    assert results["concept_rate_by_prompt"]["a knife"]["after"].value == 0.25
    assert results["seen_instead"] == {"nothing": 22, "cat": 1}
    assert results["accuracy"]["before"].value == 1
    assert results["accuracy"]["difference"].value == pytest.approx(-0.5 / 55)
    assert results["accuracy"]["difference"].low < 0 == results["accuracy"]["difference"].high
    assert results["accuracy_by_object"]["cat"]["after"].value == 0.5
    assert results["accuracy_unnamed"]["difference"].value == 0  # the cat was named
    assert results["accuracy_unnamed"]["after"].n == 2 * 54
    assert results["group_accuracy"]["difference"].value == pytest.approx(-1 / 12)
    assert 0 < results["distance"]["others"].value < 1

    written = json.loads((tmp_path / "results.json").read_text())
    assert written["concept_rate"]["after"]["n"] == 24
    assert written["protocol"]["model_before"] != written["protocol"]["model_after"]
    page = (tmp_path / "report.html").read_text()
    assert "weapon recognised" in page and page.count("<figure>") == 6 * 3 + 55


def test_a_style_is_measured_on_the_style_and_on_what_stayed(make_tiny_pipeline, tmp_path, scripted_judge, perfect):
    rows = erasure_rows([], 1, 0, style="sketch")
    parts = Counter(row.labels["part"] for row in rows)
    assert parts["object"] == 60 and parts["erased"] >= 20 and parts["style"] >= 40
    assert all(row.prompt.endswith("in sketch style") for row in rows if row.labels["part"] == "erased")
    styles = [row.labels.get("style", "plain") for row in rows]
    changed = ["plain" if style == "sketch" else style for style in styles]
    first, last = styles.index("sketch"), len(styles) - 1 - styles[::-1].index("mosaic")
    changed[first], changed[last] = "sketch", "plain"
    judge = scripted_judge(perfect(rows), perfect(rows), styles=[styles, changed])
    models = (make_tiny_pipeline(), make_tiny_pipeline(seed=1))
    results = evaluate_erasure(*models, [], judge, tmp_path, 1, settings=QUICK, batch_size=64, style="sketch")
    rate, kept = results["concept_rate"], results["style_accuracy"]
    assert (rate["before"].value, rate["after"].value) == (1, pytest.approx(1 / parts["erased"]))
    assert results["concept_rate_by_prompt"][rows[first].prompt]["after"].value == 1
    assert results["seen_instead"] == {"plain": parts["erased"] - 1}
    styled = [row.labels["subject"] for row in rows if row.labels["part"] == "style"]
    loss = 1 / styled.count(rows[last].labels["subject"])  # of one object; the mean is over objects
    assert kept["difference"].value == pytest.approx(-loss / len(set(styled)))
    assert results["accuracy"]["difference"].value == 0 and results["group_accuracy"] is None
    assert "sketch style recognised" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("erased", "group", "style", "message"),
    [([], None, "oil", "style is oil; allowed are sketch"), (["knife"], None, "sketch", "alone here, without knife")],
)
def test_what_cannot_be_evaluated_of_a_style_is_refused(erased, group, style, message):
    with pytest.raises(ValueError, match=message):
        erasure_rows(erased, 1, 0, group, style)


def test_equal_models_do_not_differ(tiny_pipeline, tmp_path, scripted_judge):
    results = evaluate_erasure(
        tiny_pipeline, tiny_pipeline, ["knife"], scripted_judge(), tmp_path, images_per_object=1, settings=QUICK
    )
    assert results["distance"]["others"].value == results["accuracy"]["difference"].value == 0


@pytest.mark.parametrize(
    ("erased", "group", "message"),
    [
        ([], None, "at least one object"),
        (["knife", "knife"], None, "none twice"),
        (["spoon"], None, "spoon: unknown; allowed are knife"),
        (["knife"], "cutlery", "group is cutlery; allowed are weapon"),
        (["knife"], "weapon", "not erased as a whole: gun"),
        (OBJECTS, None, "leave some over"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(erased, group, message):
    with pytest.raises(ValueError, match=message):
        erasure_rows(erased, 1, 0, group)
    with pytest.raises(ValueError, match="must be at least 1"):
        erasure_rows(["knife"], 0, 0)
