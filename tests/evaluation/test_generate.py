import json

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from diffusers_safe.evaluation.generate import (
    GenerationSettings,
    PromptRow,
    generate,
    load_images,
    pipeline_fingerprint,
    read_manifest,
)


QUICK = GenerationSettings(num_inference_steps=2, guidance_scale=4.0)


class SafetyChecker(torch.nn.Module):
    """One that objects to everything."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images, clip_input):
        return 0 * images, [True] * len(images)


def rows_of(count):
    return [PromptRow(f"image-{i}", ["a knife", "a cat"][i % 2], seed=100 + i, labels={"i": i}) for i in range(count)]


def test_an_image_depends_on_its_own_row_only(tiny_pipeline, tmp_path):
    rows = rows_of(5)
    together = load_images(tmp_path / "5", generate(tiny_pipeline, rows, tmp_path / "5", QUICK, batch_size=5))
    single = load_images(tmp_path / "1", generate(tiny_pipeline, rows[::-1], tmp_path / "1", QUICK, batch_size=1))
    difference = np.abs(together.astype(int) - single[::-1])
    assert together.shape == (5, 64, 64, 3)
    assert difference.max() <= 1 and difference.mean() < 1e-3  # rounding
    assert np.abs(together[0].astype(int) - together[2]).mean() > 1  # same prompt, another seed


def test_the_manifest_says_how_each_image_came_about(tiny_pipeline, tmp_path):
    rows = rows_of(2)
    manifest = generate(tiny_pipeline, rows, tmp_path, QUICK)
    assert manifest == read_manifest(tmp_path)
    assert manifest[1] == {
        "id": "image-1",
        "prompt": "a cat",
        "seed": 101,
        "labels": {"i": 1},
        "file": "image-1.png",
        "black": False,
        "sha256": manifest[1]["sha256"],
        "model": pipeline_fingerprint(tiny_pipeline),
        "settings": {
            "num_inference_steps": 2,
            "guidance_scale": 4.0,
            "height": None,
            "width": None,
            "negative_prompt": None,
            "call": {},
        },
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image-0.png", "image-1.png", "manifest.jsonl"]


def test_a_killed_run_continues(tiny_pipeline, tmp_path, monkeypatch):
    rows = rows_of(6)
    expected = generate(tiny_pipeline, rows, tmp_path / "whole", QUICK, batch_size=2)

    decode, calls = tiny_pipeline.vae.decode, []

    def decode_until_killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    monkeypatch.setattr(tiny_pipeline.vae, "decode", decode_until_killed)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny_pipeline, rows, tmp_path / "killed", QUICK, batch_size=2)
    with (tmp_path / "killed" / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"id": "image-4", "pro')  # cut off in the middle of a line
    (tmp_path / "killed" / "image-1.png").write_bytes(b"broken")

    assert generate(tiny_pipeline, rows, tmp_path / "killed", QUICK, batch_size=2)[2:4] == expected[2:4]
    assert len(calls) == 3 + 2  # image 1 again, then 4 and 5
    images = [load_images(tmp_path / name, read_manifest(tmp_path / name)) for name in ("whole", "killed")]
    order = [[row["id"] for row in read_manifest(tmp_path / name)] for name in ("whole", "killed")]
    assert sorted(order[0]) == sorted(order[1])
    again = images[1][[order[1].index(name) for name in order[0]]]
    assert np.abs(images[0].astype(int) - again).max() <= 1
    generate(tiny_pipeline, rows, tmp_path / "killed", QUICK, batch_size=2)
    assert len(calls) == 5  # all finished: nothing to do


def test_a_folder_of_other_images_is_refused(tiny_pipeline, make_tiny_pipeline, tmp_path):
    rows = rows_of(2)
    generate(tiny_pipeline, rows, tmp_path, QUICK)
    manifest = (tmp_path / "manifest.jsonl").read_bytes()
    with pytest.raises(ValueError, match="its images have model"):
        generate(make_tiny_pipeline(seed=1), rows, tmp_path, QUICK)
    with pytest.raises(ValueError, match="its images have settings"):
        generate(tiny_pipeline, rows, tmp_path, GenerationSettings(num_inference_steps=3, guidance_scale=4.0))
    with pytest.raises(ValueError, match="image-1 has seed 101, not 5"):
        generate(tiny_pipeline, [PromptRow("image-1", "a cat", 5, {"i": 1})], tmp_path, QUICK)
    assert (tmp_path / "manifest.jsonl").read_bytes() == manifest


def test_the_fingerprint_sees_weights_and_scheduler(tiny_pipeline, make_tiny_pipeline):
    original = pipeline_fingerprint(tiny_pipeline)
    assert pipeline_fingerprint(make_tiny_pipeline()) == original
    tiny_pipeline.safety_checker = SafetyChecker()
    assert pipeline_fingerprint(tiny_pipeline) == original
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias[0] += 1e-3
    assert pipeline_fingerprint(tiny_pipeline) != original
    other = make_tiny_pipeline()
    other.scheduler.register_to_config(prediction_type="v_prediction")
    assert pipeline_fingerprint(other) != original


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([PromptRow("a", "a cat", 0), PromptRow("a", "a dog", 1)], "row id a occurs twice"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(tiny_pipeline, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_pipeline, rows, tmp_path / "new", QUICK)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [("../a", "a cat", 0), ("", "a cat", 0), ("a", "a cat", -1)])
def test_bad_ids_and_seeds_are_refused(arguments):
    with pytest.raises(ValueError, match="is no file name|must lie between"):
        PromptRow(*arguments)


def test_the_safety_checker_is_off_and_comes_back(tiny_pipeline, tmp_path, monkeypatch):
    checker = SafetyChecker()
    tiny_pipeline.register_modules(safety_checker=checker)
    tiny_pipeline.set_progress_bar_config(leave=False)
    config = dict(tiny_pipeline.config)
    rows = generate(tiny_pipeline, rows_of(1), tmp_path, QUICK)
    assert not rows[0]["black"]

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny_pipeline.unet, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(tiny_pipeline, rows_of(2), tmp_path, QUICK)
    assert tiny_pipeline.safety_checker is checker
    assert dict(tiny_pipeline.config) == config  # still there after save_pretrained
    assert tiny_pipeline._progress_bar_config == {"leave": False}


def test_the_safety_checker_can_stay_on(tiny_pipeline, tmp_path):
    tiny_pipeline.register_modules(safety_checker=SafetyChecker())
    features = BatchFeature({"pixel_values": torch.zeros(1)})
    vars(tiny_pipeline)["feature_extractor"] = lambda images, return_tensors: features
    rows = generate(tiny_pipeline, rows_of(2), tmp_path, QUICK, safety_checker=True)
    assert [row["black"] for row in rows] == [True, True]


def test_black_images_are_counted(tiny_pipeline, tmp_path):
    with torch.no_grad():
        tiny_pipeline.vae.decoder.conv_out.weight.zero_()
        tiny_pipeline.vae.decoder.conv_out.bias.fill_(-5.0)
    assert [row["black"] for row in generate(tiny_pipeline, rows_of(2), tmp_path, QUICK)] == [True, True]


def test_the_negative_prompt_counts(tiny_pipeline, tmp_path):
    settings = GenerationSettings(num_inference_steps=2, guidance_scale=4.0, negative_prompt="a weapon")
    plain, negative = (generate(tiny_pipeline, rows_of(2), tmp_path / str(s), s) for s in (QUICK, settings))
    assert plain[0]["sha256"] != negative[0]["sha256"]


def test_loading_names_what_is_missing_or_broken(tiny_pipeline, tmp_path):
    rows = generate(tiny_pipeline, rows_of(2), tmp_path, QUICK)
    png = tmp_path / "image-1.png"
    png.write_bytes(png.read_bytes()[:-50])
    with pytest.raises(ValueError, match="image-1.png: damaged"):
        load_images(tmp_path, rows)
    png.unlink()
    with pytest.raises(ValueError, match="image-1.png: no such file"):
        load_images(tmp_path, rows)
    with pytest.raises(ValueError, match="no rows"):
        load_images(tmp_path, [])


def test_a_manifest_must_be_one(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"id": "a"}) + "\nnot json\n")
    with pytest.raises(ValueError, match="broken manifest"):
        read_manifest(tmp_path)
