"""An output folder that was used before: what belongs to a run, and what is refused before any model is loaded."""

import json
import logging
import shutil

import pytest
from PIL import Image

from diffusers_safe.comparison.evaluate import evaluate
from diffusers_safe.comparison.models import LoadedModel
from diffusers_safe.comparison.used_folder import check_used_folder, say_what_was_replaced
from diffusers_safe.generation.folders import ImageFolder
from diffusers_safe.generation.rows import GenerationSettings, PromptRow
from diffusers_safe.metrics.pixel_distance import PixelDistance


QUICK = GenerationSettings(num_inference_steps=1, guidance_scale=1.0, height=16, width=16)
ROWS = [PromptRow(str(number), f"thing {number}", number) for number in range(3)]


class Unloadable:
    def __init__(self, name):
        self.name = name

    def load(self, settings):
        raise AssertionError(f"{self.name} was loaded")


@pytest.fixture(scope="module")
def pipelines(make_tiny_pipeline):
    return [make_tiny_pipeline(seed) for seed in range(2)]


@pytest.fixture
def models(pipelines):
    return [LoadedModel(name, pipeline) for name, pipeline in zip(("original", "erased"), pipelines)]


@pytest.fixture(scope="module")
def finished(pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    models = [LoadedModel(name, pipeline) for name, pipeline in zip(("original", "erased"), pipelines)]
    evaluate(models, ROWS, [PixelDistance()], folder, QUICK)
    return folder


@pytest.fixture
def used(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "used")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHER_PROMPTS = "it holds images of other prompts or seeds, such as 0 of 'original'"
OTHER_STEPS = GenerationSettings(num_inference_steps=2, guidance_scale=1.0, height=16, width=16)


@pytest.mark.parametrize("report", [True, False], ids=["finished", "stopped"])
@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([PromptRow("0", "thing 9", 0), *ROWS[1:]], QUICK, OTHER_PROMPTS),
        ([PromptRow("0", "thing 0", 9), *ROWS[1:]], QUICK, OTHER_PROMPTS),
        (ROWS[1:], QUICK, OTHER_PROMPTS),
        ([PromptRow("x", "thing x", 0)], QUICK, OTHER_PROMPTS),
        (ROWS, OTHER_STEPS, "its images of 'original' have num_inference_steps 1, not 2"),
        ([PromptRow("0", "thing 0", 0, guidance_scale=3.0), *ROWS[1:]], QUICK, "have guidance_scale 1.0, not 3.0"),
        ([PromptRow("0", "thing 0", 0, height=24, width=24), *ROWS[1:]], QUICK, "have height 16, not 24"),
    ],
)
def test_other_prompts_and_settings_are_refused(used, report, rows, settings, message):
    if not report:
        (used / "results.json").unlink()
    before = files(used)
    with pytest.raises(ValueError, match=f"output_dir .*: .*{message}; give another folder"):
        evaluate([Unloadable("original"), Unloadable("erased")], rows, [PixelDistance()], used, settings)
    assert files(used) == before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("original", "third"), "has a model 'erased', which is not among these"),
        (("erased", "original"), "compares with 'original', not with 'erased'"),
        (("original", "erased", "third"), None),
    ],
)
def test_a_report_of_other_models_is_refused_and_more_models_may_come(used, names, message):
    asked, settings = {name: {} for name in names}, dict.fromkeys(names, QUICK)
    if message is None:
        assert check_used_folder(used, asked, ROWS, settings)["protocol"]["original"] == "original"
    else:
        with pytest.raises(ValueError, match=message):
            check_used_folder(used, asked, ROWS, settings)


def test_a_model_that_is_asked_for_in_another_way_is_refused(used):
    results = json.loads((used / "results.json").read_text())
    results["models"]["erased"] |= {"model": "a", "safety": "max"}
    (used / "results.json").write_text(json.dumps(results))
    settings = {"original": QUICK, "erased": QUICK}
    for asked, message in (
        ({"model": "b", "safety": "max"}, "'erased' with model a, now b"),
        ({"model": "a"}, "'erased' with safety max, now not given"),
        ({"model": "a", "safety": "max", "lora": "x"}, "'erased' with lora not given, now x"),
    ):
        with pytest.raises(ValueError, match=message):
            check_used_folder(used, {"original": {}, "erased": asked}, ROWS, settings)
    assert check_used_folder(used, {"original": {}, "erased": {"model": "a", "safety": "max"}}, ROWS, settings)


def test_the_same_run_and_a_larger_one_go_on(models, used, caplog):
    same = evaluate(models, ROWS, [PixelDistance()], used, QUICK)
    assert not caplog.records
    rows = [*ROWS, PromptRow("3", "thing 3", 3)]
    larger = evaluate(models, rows, [PixelDistance()], used, QUICK)
    assert (same["protocol"]["prompts"]["images"], larger["protocol"]["prompts"]["images"]) == (3, 4)
    assert "replaced its earlier report, which had other numbers of pixel_distance" in caplog.text


def test_folders_of_images_are_known_by_their_images(tmp_path):
    for place, colour in (("a", 1), ("b", 9), ("x", 200)):
        (tmp_path / place / "pngs").mkdir(parents=True)
        for row in ROWS:
            Image.new("RGB", (16, 16), (colour,) * 3).save(tmp_path / place / "pngs" / f"{row.id}.png")
    first, second, other = (ImageFolder(name, tmp_path / name / "pngs") for name in ("a", "b", "x"))
    evaluate([first, second], ROWS, [PixelDistance()], tmp_path / "out")
    evaluate([first, second], ROWS, [PixelDistance()], tmp_path / "out")
    with pytest.raises(ValueError, match="b: the report in output_dir is of other images; give another folder"):
        evaluate([first, ImageFolder("b", other.folder)], ROWS, [PixelDistance()], tmp_path / "out")
    with pytest.raises(ValueError, match="its report is on other prompts"):
        evaluate([first, second], ROWS[:2], [PixelDistance()], tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[1]", "[" * 100_000, '{"protocol": {}}',
        '{"protocol": {"prompts": 1}, "models": {}, "metrics": {}}',
        '{"protocol": {"prompts": {}}, "models": {"a": 1}, "metrics": {}}',
        '{"protocol": {"prompts": {}}, "models": {}, "metrics": {"a": {}}}',
        '{"protocol": {"prompts": {}}, "models": {}, "attacks": {"a": {"models": {}}}}',
    ],
)  # fmt: skip
def test_a_file_of_another_program_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="its results.json is not from an evaluation or attacks; give another"):
        check_used_folder(tmp_path, {"a": {}}, ROWS, {"a": QUICK})


def test_evaluations_and_attacks_do_not_share_a_folder(used):
    settings = {"original": QUICK, "erased": QUICK}
    with pytest.raises(ValueError, match="it holds the report of an evaluation"):
        check_used_folder(used, {"original": {}}, ROWS, settings, "before", attacks={})


def test_what_a_new_report_has_no_more_is_said(caplog):
    before = {"nudity": {"a": {"x": 1}}, "fid": {"a": {"y": 2}}, "lpips": {"a": {"z": 3}}}
    with caplog.at_level(logging.WARNING):
        say_what_was_replaced("out", before, before)
        assert not caplog.records
        say_what_was_replaced("out", before, {"nudity": {"a": {"x": 9}}, "lpips": {"a": {"z": 3}, "b": {}}})
    assert caplog.messages == [
        "output_dir out: replaced its earlier report, which had other numbers of nudity, fid; images and scores are "
        "kept"
    ]
