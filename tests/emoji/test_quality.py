import math
import runpy
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_safe.emoji.quality import QualityArguments, evaluate_model, quality_rows
from diffusers_safe.emoji.quality_card import CARD_MARKERS, quality_table, write_card
from diffusers_safe.emoji.quality_speed import autoencoder_psnr, reconstruct
from diffusers_safe.emoji.scenes import GROUPS, OBJECTS, STYLES, is_held_out
from diffusers_safe.generation.rows import GenerationSettings


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
        tiny_pipeline,
        {"judge": scripted_judge(seen), "second judge": scripted_judge(perfect(rows))},
        tmp_path,
        1,
        settings=QUICK,
        batch_size=64,
        num_renders=20,
    )
    judged = results["judges"]["judge"]
    assert judged["objects"]["frog"].value == 0 and judged["objects"]["cat"].value == 1
    assert judged["mean"]["objects"].value == pytest.approx(59 / 60)
    assert results["judges"]["second judge"]["mean"]["objects"].value == 1
    assert (results["agreement"].value, results["agreement"].n) == (pytest.approx(1 - 1 / len(rows)), len(rows))
    assert judged["mean"]["groups"].value == 1
    assert list(judged["groups"]) == GROUPS and list(judged["styles"]) == STYLES
    assert judged["mean"]["styles"].value == 0  # the judge says "plain" to everything
    assert judged["backgrounds"]["white"].value == 1 and judged["backgrounds"]["red"].value == 0
    assert judged["held_out"]["backgrounds"].n == 60 and judged["renders"]["object"].n == 20
    assert judged["mean"]["objects with styles"].value == judged["mean"]["objects with backgrounds"].value == 1
    told = capsys.readouterr().out
    assert told.startswith("| recognised | judge | second judge |\n|---|---|---|\n| objects | 98.3 %")
    assert "lowest: frog 0.0 % [0.0, 79.3], N=1" in told and "The judges agree on the object in 99." in told
    speed = results["protocol"]["speed"]
    assert 0 < speed["seconds_per_forward"] < speed["batch_size"] / speed["images_per_second"]

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
    with pytest.raises(ValueError, match="has no line <!-- quality:begin -->"):
        QualityArguments("out", model=tiny_model_folder, judges=[str(judge)], card=str(card))
    with pytest.raises(ValueError, match="no such model; the folder must hold model_index.json"):
        QualityArguments("out", model=str(tmp_path), judges=[str(judge)])


def test_reconstruction_keeps_shape_and_type(tiny_pipeline):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    restored = reconstruct(tiny_pipeline.vae, pictures, batch_size=2)
    assert restored.shape == pictures.shape and restored.dtype == np.uint8


class Darker(torch.nn.Module):
    """An autoencoder that gives back half of the light."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, pictures):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pictures))

    def decode(self, latents):
        return SimpleNamespace(sample=(latents + 1) / 2 - 1)


def test_the_autoencoder_is_measured_by_style():
    pictures = np.stack([np.full((64, 64, 3), value, dtype=np.uint8) for value in (200, 100, 100)])
    psnr = autoencoder_psnr(Darker(), pictures, ["plain", "sepia", "sepia"])
    errors = {"all": (100**2 + 2 * 50**2) / 3, "plain": 100**2, "sepia": 50**2}
    assert psnr == {name: pytest.approx(10 * math.log10(255**2 / error), abs=0.01) for name, error in errors.items()}


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
