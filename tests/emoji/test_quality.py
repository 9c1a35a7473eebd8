import runpy
import sys
from collections import Counter

import numpy as np
import pytest

from diffusers_safe.emoji.quality import (
    CARD_MARKERS,
    QualityArguments,
    evaluate_model,
    quality_rows,
    quality_table,
    reconstruct,
    write_card,
)
from diffusers_safe.emoji.scenes import GROUPS, OBJECTS, STYLES, is_held_out
from diffusers_safe.evaluation.generate import GenerationSettings


QUICK = GenerationSettings(num_inference_steps=1, guidance_scale=1.0, height=16, width=16)


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


def test_quality_is_measured_printed_and_put_on_the_card(tiny_pipeline, tmp_path, capsys, scripted_judge, perfect):
    rows = quality_rows(1, 0)
    seen = perfect(rows)
    seen[OBJECTS.index("frog")] = "cat"
    results = evaluate_model(
        tiny_pipeline, scripted_judge(seen), tmp_path, 1, settings=QUICK, batch_size=64, num_renders=20
    )
    assert results["objects"]["frog"].value == 0 and results["objects"]["cat"].value == 1
    assert results["mean"]["objects"].value == pytest.approx(59 / 60)
    assert results["mean"]["groups"].value == 1
    assert list(results["groups"]) == GROUPS and list(results["styles"]) == STYLES
    assert results["mean"]["styles"].value == 0  # the judge says "plain" to everything
    assert results["backgrounds"]["white"].value == 1 and results["backgrounds"]["red"].value == 0
    assert results["held_out"]["backgrounds"].n == 60
    assert results["classifier"]["reconstructions"]["object"].n == 20
    assert results["mean"]["objects with styles"].value == results["mean"]["objects with backgrounds"].value == 1
    assert "least: frog 0.0 % [0.0, 79.3], N=1" in capsys.readouterr().out

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
    arguments = ["quality", "--output_dir", str(tmp_path / "out"), "--model", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.delitem(sys.modules, "diffusers_safe.emoji.quality")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("diffusers_safe.emoji.quality", run_name="__main__")
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [f"quality: error: {tmp_path}: no such model; the folder must hold model_index.json"]
    assert not (tmp_path / "out").exists()
