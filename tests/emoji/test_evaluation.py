import json
import runpy
import sys
from collections import Counter

import numpy as np
import pytest

from diffusers_safe.emoji.classifier import HEADS
from diffusers_safe.emoji.evaluation import (
    CARD_MARKERS,
    QualityArguments,
    erasure_rows,
    evaluate_erasure,
    evaluate_model,
    quality_rows,
    quality_table,
    reconstruct,
    write_card,
)
from diffusers_safe.emoji.scenes import GROUPS, OBJECTS, STYLES, group_members, is_held_out
from diffusers_safe.evaluation.generate import GenerationSettings


QUICK = GenerationSettings(num_inference_steps=1, guidance_scale=1.0, height=16, width=16)
WEAPONS = group_members("weapon")


class ScriptedJudge:
    """Answers what it was told to, call by call; `None` takes the first label of a head."""

    def __init__(self, *objects):
        self.objects = list(objects)

    def classify(self, pictures):
        names = {head: [labels[0]] * len(pictures) for head, labels in HEADS.items()}
        if self.objects and (answer := self.objects.pop(0)) is not None:
            assert len(answer) == len(pictures)
            names["object"] = answer
        return names


def perfect(rows):
    return [name if (name := row.labels["subject"]) in OBJECTS else group_members(name)[0] for row in rows]


def test_rows_have_their_own_seeds_and_keep_them_when_more_are_asked_for():
    few, many = erasure_rows(WEAPONS, 2, 0, "weapon"), erasure_rows(WEAPONS, 4, 0, "weapon")
    assert len({row.seed for row in many}) == len({row.id for row in many}) == len(many)
    assert {(row.id, row.seed) for row in few} < {(row.id, row.seed) for row in many}
    assert Counter(row.labels["part"] for row in few) == {"erased": 12, "object": 110, "group": 12}
    assert {row.seed for row in few}.isdisjoint(row.seed for row in erasure_rows(WEAPONS, 2, 1, "weapon"))


def test_an_erasure_is_measured_on_what_went_and_on_what_stayed(make_tiny_pipeline, tmp_path):
    rows = erasure_rows(WEAPONS, 2, 0, "weapon")
    before, after = perfect(rows), perfect(rows)
    after[:12] = ["gun", *["nothing"] * 10, "cat"]  # a gun for "a knife" counts as a weapon
    cat, fruit = ([i for i, row in enumerate(rows) if row.labels["subject"] == name] for name in ("cat", "fruit"))
    after[cat[0]] = after[fruit[0]] = "dog"
    results = evaluate_erasure(
        make_tiny_pipeline(), make_tiny_pipeline(seed=1), WEAPONS, ScriptedJudge(before, after), tmp_path,
        images_per_object=2, group="weapon", settings=QUICK, batch_size=64,
    )  # fmt: skip
    rate = results["concept_rate"]
    assert (rate["before"].value, rate["after"].value, rate["after"].n) == (1, 1 / 12, 12)
    assert results["concept_rate_by_prompt"]["a knife"]["after"].value == 0.5
    assert results["seen_instead"] == {"nothing": 10, "cat": 1}
    assert results["accuracy"]["before"].value == 1
    assert results["accuracy"]["difference"].value == pytest.approx(-0.5 / 55)
    assert results["accuracy"]["difference"].low < 0 == results["accuracy"]["difference"].high
    assert results["accuracy_by_object"]["cat"]["after"].value == 0.5
    assert results["group_accuracy"]["difference"].value == pytest.approx(-1 / 12)
    assert 0 < results["distance"]["others"].value < 1

    written = json.loads((tmp_path / "results.json").read_text())
    assert written["concept_rate"]["after"]["n"] == 12
    assert written["protocol"]["model_before"] != written["protocol"]["model_after"]
    page = (tmp_path / "report.html").read_text()
    assert "weapon recognised" in page and page.count("<figure>") == 6 * 2 + 55


def test_equal_models_do_not_differ(tiny_pipeline, tmp_path):
    results = evaluate_erasure(
        tiny_pipeline, tiny_pipeline, ["knife"], ScriptedJudge(), tmp_path, images_per_object=1, settings=QUICK
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


def test_quality_rows_cover_everything_and_know_what_was_held_out():
    rows = quality_rows(8, 0)
    assert Counter(row.labels["part"] for row in rows) == {
        "objects": 480, "groups": 7 * 32, "styles": 180, "backgrounds": 480,
    }  # fmt: skip
    for row in rows:
        if row.labels["part"] == "backgrounds":
            assert row.labels["held_out"] == is_held_out(row.labels["subject"], row.labels["background"], None)
    held_out = [row for row in rows if row.labels.get("held_out")]
    assert Counter(row.labels["part"] for row in held_out) == {"backgrounds": 60, "styles": 20}
    assert len({row.id for row in rows}) == len(rows)


def test_quality_is_measured_printed_and_put_on_the_card(tiny_pipeline, tmp_path, capsys):
    rows = quality_rows(1, 0)
    seen = perfect(rows)
    seen[OBJECTS.index("frog")] = "cat"
    results = evaluate_model(
        tiny_pipeline, ScriptedJudge(seen), tmp_path, 1, settings=QUICK, batch_size=64, num_renders=20
    )
    assert results["objects"]["frog"].value == 0 and results["objects"]["cat"].value == 1
    assert results["mean"]["objects"].value == pytest.approx(59 / 60)
    assert results["mean"]["groups"].value == 1
    assert list(results["groups"]) == GROUPS and list(results["styles"]) == STYLES
    assert results["mean"]["styles"].value == 0  # the judge says "plain" to everything
    assert results["backgrounds"]["white"].value == 1 and results["backgrounds"]["red"].value == 0
    assert results["held_out"]["backgrounds"].n == 60
    assert results["classifier"]["reconstructions"]["object"].n == 20
    assert "least: frog 0.0 %" in capsys.readouterr().out

    card = tmp_path / "README.md"
    for _ in range(2):  # the second time replaces the first
        if not card.exists():
            card.write_text(f"# Emoji\n{CARD_MARKERS[0]}\n{CARD_MARKERS[1]}\nThe end.\n")
        write_card(card, results)
    assert card.read_text() == f"# Emoji\n{CARD_MARKERS[0]}\n{quality_table(results)}\n{CARD_MARKERS[1]}\nThe end.\n"


def test_a_card_without_markers_is_refused_before_any_work(tiny_model_folder, tmp_path):
    card, judge = tmp_path / "README.md", tmp_path / "judge"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    card.write_text("# Emoji\n")
    with pytest.raises(ValueError, match="holds no line <!-- quality:begin -->"):
        QualityArguments("out", model=tiny_model_folder, classifier=str(judge), card=str(card))
    with pytest.raises(ValueError, match="no such model; the folder must hold model_index.json"):
        QualityArguments("out", model=str(tmp_path), classifier=str(judge))


def test_reconstruction_keeps_shape_and_type(tiny_pipeline):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    restored = reconstruct(tiny_pipeline.vae, pictures, batch_size=2)
    assert restored.shape == pictures.shape and restored.dtype == np.uint8


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    arguments = ["evaluation", "--output_dir", str(tmp_path / "out"), "--model", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.delitem(sys.modules, "diffusers_safe.emoji.evaluation")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("diffusers_safe.emoji.evaluation", run_name="__main__")
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [f"evaluation: error: {tmp_path}: no such model; the folder must hold model_index.json"]
    assert not (tmp_path / "out").exists()
