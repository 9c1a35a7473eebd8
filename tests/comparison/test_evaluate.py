import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_safe.comparison.evaluate import evaluate
from diffusers_safe.comparison.evaluation_report import categories_of
from diffusers_safe.comparison.models import LoadedModel
from diffusers_safe.comparison.paper_results import PUBLISHED, PublishedProtocol, published_numbers
from diffusers_safe.families import make_family
from diffusers_safe.generation.folders import ImageFolder
from diffusers_safe.generation.generate import generate
from diffusers_safe.generation.manifest import load_images, read_manifest
from diffusers_safe.generation.models import SteeredModel
from diffusers_safe.generation.rows import GenerationSettings, PromptRow
from diffusers_safe.metrics.base import Metric, Quantity
from diffusers_safe.metrics.pixel_distance import PixelDistance
from diffusers_safe.output_folders import RECORD
from diffusers_safe.report.statistics import Estimate


QUICK = GenerationSettings(num_inference_steps=1, guidance_scale=1.0, height=16, width=16)
CATEGORIES = ["hate", "shocking"]


class Bright(Metric):
    """The share of images that are brighter than a threshold, which no raw score knows."""

    name = "bright"
    quantities = {
        "bright": Quantity("bright images", "%", "lower", of_concept=True),
        "brightness": Quantity("brightness", better="higher"),
    }

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold
        self.scored = 0

    def identity(self):
        return {"metric": self.name}

    def score(self, images, rows, originals=None):
        self.scored += len(images)
        return [{"mean": float(np.asarray(image).mean())} for image in images]

    def values(self, row, score):
        return {"bright": float(score["mean"] > self.threshold), "brightness": score["mean"] / 255}

    def sweep(self):
        means = [score["mean"] for score in self.scores]
        line = [(t, Estimate.rate(sum(mean > t for mean in means), len(means))) for t in (64, 128, 192)]
        return {"bright images": line}


class Halves(Metric):
    """Scripted: the concept is seen on what asks for it, unless the model is erased, which loses one other thing."""

    name = "halves"
    quantities = {
        "concept": Quantity("concept seen", "%", "lower", of_concept=True, note="As told.", drawn="images"),
        "others": Quantity("others seen", "%", "higher"),
        "odd": Quantity("odd others seen", "%", "higher"),
    }

    def identity(self):
        return {"metric": self.name}

    def score(self, images, rows, originals=None):
        return [{"erased": row["model"] != self.original} for row in rows]

    def values(self, row, score):
        number = int(row["prompt"].split()[-1])
        if number < 2:
            return {"concept": float(not score["erased"] or row["id"] == "0_0")}
        shown = float(not (score["erased"] and row["prompt"] == "a thing 3"))
        return {"others": shown, **({"odd": shown} if number % 2 else {})}

    def seen(self, row, score):
        return "knife" if self.values(row, score).get("concept") else "thing"


class Unloadable:
    """A model that must not be loaded."""

    def __init__(self, name):
        self.name = name

    def load(self, settings):
        raise AssertionError(f"{self.name} was loaded")


def rows_of(prompts=4, images=2):
    return [
        PromptRow(f"{p}_{i}", f"a thing {p}", 10 * p + i, {"categories": [CATEGORIES[p % 2], "other"]})
        for p in range(prompts)
        for i in range(images)
    ]


@pytest.fixture(scope="module")
def pipelines(make_tiny_pipeline):
    return [make_tiny_pipeline(seed) for seed in range(3)]


@pytest.fixture
def models(pipelines):
    return [LoadedModel(name, pipeline) for name, pipeline in zip(("original", "erased", "third"), pipelines)]


def means_of(folder, name):
    images = load_images(folder / "images" / name, read_manifest(folder / "images" / name))
    return images.reshape(len(images), -1).mean(axis=1)


def middle_of(folder):
    return float(np.median(np.concatenate([means_of(folder, name) for name in ("original", "erased")])))


def test_models_are_compared_on_the_same_prompts_and_seeds(models, tmp_path):
    rows = rows_of()
    evaluate(models, rows, [PixelDistance()], tmp_path, QUICK)
    threshold = middle_of(tmp_path)
    results = evaluate(
        models, rows, [Bright(threshold), PixelDistance()], tmp_path, QUICK, prompts={"source": "x.csv"}
    )
    before, after = (means_of(tmp_path, name) for name in ("original", "erased"))
    bright = results["metrics"]["bright"]
    assert bright["estimates"]["erased"]["bright"]["value"] == (after > threshold).mean()
    difference = bright["differences"]["erased"]["brightness"]["estimate"]
    assert difference["value"] == pytest.approx((after - before).mean() / 255)
    assert difference["low"] < difference["value"] < difference["high"] and difference["unit"] == ""
    assert bright["differences"]["erased"]["bright"]["estimate"]["unit"] == "points"
    assert "original" not in bright["differences"]
    assert list(results["metrics"]["pixel_distance"]["estimates"]) == ["erased", "third"]
    assert bright["sweeps"]["third"]["bright images"][0][0] == 64

    manifests = [read_manifest(tmp_path / "images" / model.name) for model in models]
    assert len({tuple((row["id"], row["prompt"], row["seed"]) for row in manifest) for manifest in manifests}) == 1
    assert len({facts["fingerprint"] for facts in results["models"].values()}) == 3
    assert results["protocol"]["prompts"]["different"] == 4 and results["protocol"]["prompts"]["source"] == "x.csv"
    assert results == json.loads((tmp_path / "results.json").read_text())
    for name in ("results.json", "results.md", "report.html"):
        assert str(tmp_path) not in (tmp_path / name).read_text()  # where things lie is nobody's business
    page = (tmp_path / "report.html").read_text()
    for title in ("All numbers", "Erasure against retention", "At other thresholds", "bright images, by category"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<figcaption>") == len(rows) and page.count('class="blur"') == results["report"]["flagged"] > 0
    assert "| bright images ↓, N=" in (tmp_path / "results.md").read_text()


def test_rows_that_repeat_an_image_are_counted_and_told(models, tmp_path):
    rows = rows_of(2, 1)
    results = evaluate(models[:2], rows, [PixelDistance()], tmp_path / "once", QUICK)
    assert "repeated" not in results["protocol"]["prompts"]
    rows += [PromptRow("again", rows[0].prompt, rows[0].seed)]
    results = evaluate(models[:2], rows, [PixelDistance()], tmp_path / "twice", QUICK)
    assert results["protocol"]["prompts"]["images"] == 3 and results["protocol"]["prompts"]["repeated"] == 1
    for name in ("results.md", "report.html"):
        text = (tmp_path / "twice" / name).read_text()
        assert "1 repeat the prompt and seed of another, and N counts them" in text
        assert "repeat the prompt" not in (tmp_path / "once" / name).read_text()


def test_another_threshold_neither_generates_nor_scores(models, tmp_path, monkeypatch):
    rows = rows_of(3, 1)
    first = Bright(0)
    evaluate(models[:2], rows, [first], tmp_path, QUICK)
    assert first.scored == 6
    monkeypatch.setattr(models[0].pipeline.vae, "decode", None)
    again = Bright(255)
    results = evaluate(models[:2], rows, [again], tmp_path, QUICK)
    assert again.scored == 0 and results["metrics"]["bright"]["estimates"]["erased"]["bright"]["value"] == 0
    fingerprint = results["models"]["original"]["fingerprint"]
    unloaded = [Unloadable("original"), Unloadable("erased")]
    results = evaluate(unloaded, rows, [Bright(0)], tmp_path, QUICK, images_only=True)
    assert results["metrics"]["bright"]["estimates"]["erased"]["bright"]["value"] == 1
    facts = results["models"]["original"]
    assert (facts["fingerprint"], facts["scheduler"]) == (fingerprint, "DDIMScheduler")
    assert facts["settings"]["height"] == 16


def test_a_stopped_run_loses_nothing(models, tmp_path, monkeypatch):
    rows, stopped = rows_of(3, 1), Bright(0)

    def stop(images, rows, originals=None):
        if stopped.scored:
            raise KeyboardInterrupt
        return Bright.score(stopped, images, rows)

    monkeypatch.setattr(stopped, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models[:2], rows, [stopped], tmp_path, QUICK, scoring_batch_size=2)
    assert not (tmp_path / "results.json").exists()
    for model in models[:2]:
        monkeypatch.setattr(model.pipeline.vae, "decode", None)  # what is there is not drawn again
    again = Bright(0)
    evaluate(models[:2], rows, [again], tmp_path, QUICK, scoring_batch_size=2)
    assert stopped.scored + again.scored == 6


def test_equal_models_do_not_differ(pipelines, tmp_path):
    same = [LoadedModel("a", pipelines[0]), LoadedModel("b", pipelines[0])]
    results = evaluate(same, rows_of(3, 1), [Bright(100), PixelDistance()], tmp_path, QUICK)
    change = results["metrics"]["bright"]["differences"]["b"]["bright"]["estimate"]
    assert change["value"] == 0 and change["low"] == -change["high"] < 0  # of three prompts only
    assert results["metrics"]["pixel_distance"]["estimates"]["b"]["pixel_distance"]["value"] == 0
    assert "b generates exactly the images of a" in (tmp_path / "report.html").read_text()


def test_black_images_are_counted_and_told(make_tiny_pipeline, models, tmp_path):
    black = make_tiny_pipeline()
    with torch.no_grad():
        black.vae.decoder.conv_out.weight.zero_()
        black.vae.decoder.conv_out.bias.fill_(-5.0)
    results = evaluate([models[0], LoadedModel("dark", black)], rows_of(2, 1), [Bright(0)], tmp_path, QUICK)
    assert results["protocol"]["black_images"] == {"original": 0, "dark": 2}
    assert "2 of 2 images of dark are all black" in (tmp_path / "report.html").read_text()
    assert "* Warning: 2 of 2 images of dark are all black" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(("blur", "expected"), [("all", 6), ("none", 0), ("flagged", 0)])
def test_what_is_blurred_can_be_chosen(models, tmp_path, blur, expected):
    evaluate(models[:2], rows_of(3, 1), [Bright(255)], tmp_path, QUICK, blur=blur)
    assert (tmp_path / "report.html").read_text().count('class="blur"') == expected


def test_pictures_are_few_and_half_of_them_flagged(models, tmp_path):
    rows = rows_of(6, 1)
    evaluate(models[:1], rows, [Bright(0)], tmp_path, QUICK)
    threshold = float(np.sort(means_of(tmp_path, "original"))[-3])  # two are brighter
    results = evaluate(models[:1], rows, [Bright(threshold)], tmp_path, QUICK, pictures=4)
    assert results["report"] == {"pictures": 4, "flagged": 2}
    assert evaluate(models[:1], rows, [Bright(0)], tmp_path, QUICK, pictures=0)["report"]["pictures"] == 0


@pytest.fixture
def halves(models, tmp_path):
    """The results of a metric that separates the erased concept from other concepts, and its page."""
    rows = rows_of(6, 3)
    metric = Halves()
    metric.original = generate(models[0].pipeline, rows, tmp_path / "images" / "original", QUICK)[0]["model"]
    results = evaluate(models[:2], rows, [metric], tmp_path, QUICK, pictures=4)
    return results, (tmp_path / "report.html").read_text()


def test_pictures_of_what_was_to_go_are_apart(halves):
    results, page = halves
    gone, kept = (part.split("</section>")[0] for part in page.split("<h2>The same seeds: ")[1:])
    assert gone.startswith("erased concept</h2>") and kept.startswith("other concepts</h2>")
    prompts = [re.findall(r"<figcaption>(.*?)</figcaption>", part) for part in (gone, kept)]
    assert prompts == [["a thing 0"] * 2 + ["a thing 1"] * 2, [f"a thing {number}" for number in (2, 3, 4, 5)]]
    # The original shows the concept, as it should; the erased model still does so once, and lost the third thing.
    assert gone.count(">knife</span>") == 5 and gone.count("missed") == 1
    assert kept.count("missed") == 1 and "4 of 12 prompts and seeds. Left original, right erased." in kept
    assert results["report"] == {"pictures": 16, "flagged": 5}
    assert "knife 6×" in page and "thing 5×, knife 1×" in page


def test_few_prompts_of_several_images_are_told_one_by_one(halves):
    results, page = halves
    of_prompts = results["metrics"]["halves"]["by_prompt"]["erased"]
    assert of_prompts["concept"] == {f"a thing {number}": asdict(Estimate.rate(1 - number, 3)) for number in (0, 1)}
    sections = re.findall(r"<h2>([^<]*), by prompt</h2>.*?<tbody>(.*?)</tbody>", page, re.S)
    assert [title for title, _ in sections] == ["concept seen", "others seen"]  # what the odd ones are is told already
    heads = [re.findall(r'<th scope="row">(.*?)</th>', body) for _, body in sections]
    assert heads == [["a thing 0", "a thing 1"], ["a thing 3", "a thing 2", "a thing 4", "a thing 5"]]


def test_an_interval_may_draw_images_where_there_are_no_other_prompts(halves):
    metric = halves[0]["metrics"]["halves"]
    assert metric["estimates"]["erased"]["concept"] == asdict(Estimate.rate(1, 6))
    assert metric["differences"]["erased"]["concept"]["test"] == "McNemar, exact"
    assert metric["differences"]["erased"]["others"]["test"] == "sign flips of prompts"
    assert metric["quantities"]["concept"]["drawn"] == "images" and "As told." in halves[1]
    with pytest.raises(ValueError, match="a: drawn 'seeds' is not allowed"):
        Quantity("a", drawn="seeds")


# --- numbers without meaning -----------------------------------------------------------------------------------------


class Seen(Metric):
    """A share of what a script says of a row, and another of which it says nothing."""

    name = "seen"
    quantities = {
        "seen": Quantity("concept seen", "%", "lower", of_concept=True),
        "never": Quantity("another concept", "%", "lower", of_concept=True),
    }

    def __init__(self, values):
        super().__init__()
        self.script = values

    def identity(self):
        return {"metric": self.name}

    def score(self, images, rows, originals=None):
        return [{}] * len(images)

    def values(self, row, score):
        return self.script(row)


def test_a_metric_that_compares_needs_another_model(models, tmp_path):
    for metrics in ([PixelDistance()], [Bright(0), PixelDistance()]):
        with pytest.raises(
            ValueError, match="metric 'pixel_distance': compares .*, and original is the only one; give"
        ):
            evaluate([Unloadable("original")], rows_of(2, 1), metrics, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_name_is_not_the_current_folder(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="output_dir '': is empty; name a folder"):
        evaluate(models[:2], rows_of(2, 1), [Bright(0)], "", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_metric_that_says_nothing_of_these_images_makes_no_empty_table(models, tmp_path):
    with pytest.raises(ValueError, match="metrics seen: give no number for any of these 2 images"):
        evaluate(models[:2], rows_of(2, 1), [Seen(lambda row: {})], tmp_path, QUICK)
    assert not (tmp_path / "results.json").exists()
    results = evaluate(models[:2], rows_of(2, 1), [Seen(lambda row: {}), Bright(0)], tmp_path, QUICK)
    assert "seen: no number, because it does not apply to any of these images." in results["warnings"]


FEW = "Fewer than 20 images of a model"


@pytest.mark.parametrize(
    ("prompts", "images", "seen", "expected"),
    [
        (7, 3, 1.0, []),
        (7, 3, 0.0, ["concept seen: 0 of 21 images of original. These prompts do not show"]),
        (1, 1, 1.0, [f"{FEW} (N=1): these numbers prove little. A rate of 0 in 1 may be one of 79 %."]),
        (1, 20, 1.0, ["All images are of one prompt, so the numbers say nothing about other prompts."]),
        (5, 4, 1.0, ["Only 5 different prompts: intervals over prompts are rough"]),
        (10, 1, 1.0, [f"{FEW} (N=10)"]),
    ],
)
def test_numbers_without_meaning_are_commented(models, tmp_path, prompts, images, seen, expected):
    metric = Seen(lambda row: {"seen": seen})
    results = evaluate(models[:2], rows_of(prompts, images), [metric], tmp_path, QUICK)
    *told, last = sorted(results["warnings"], key=lambda text: text.startswith("another concept"))
    assert last == "another concept: no number, because no image is about it, or there are too few."
    assert len(told) == len(expected) and all(map(str.startswith, told, expected)), told
    table, page = (tmp_path / "results.md").read_text(), (tmp_path / "report.html").read_text()
    assert all(f"* Warning: {text}" in table and text in page for text in expected)


# --- folders of images -----------------------------------------------------------------------------------------------


def save_pngs(folder, rows, colour=(9, 9, 200)):
    folder.mkdir()
    for row in rows:
        Image.new("RGB", (16, 16), colour).save(folder / f"{row.id}.png")
    return folder


def test_folders_of_images_stand_in_for_models(models, tmp_path):
    rows = rows_of(3, 1)
    generate(models[1].pipeline, rows, tmp_path / "ours", QUICK)
    theirs = save_pngs(tmp_path / "theirs", rows)
    subjects = [models[0], ImageFolder("ours", tmp_path / "ours"), ImageFolder("theirs", theirs)]
    results = evaluate(subjects, rows, [Bright(0), PixelDistance()], tmp_path / "out", QUICK)
    estimates = results["metrics"]["bright"]["estimates"]
    assert estimates["theirs"]["brightness"]["value"] == pytest.approx((9 + 9 + 200) / 3 / 255)
    assert results["models"]["ours"]["fingerprint"] == read_manifest(tmp_path / "ours")[0]["model"]
    assert results["models"]["theirs"]["fingerprint"] is None
    assert results["models"]["theirs"]["images_of"] == "theirs"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How the images of theirs were generated is unknown" in page and "ours was not sampled" not in page
    other = GenerationSettings(num_inference_steps=2, guidance_scale=1.0, height=16, width=16)
    evaluate(subjects[1::-1], rows, [Bright(0)], tmp_path / "other", other)
    page = (tmp_path / "other" / "report.html").read_text()
    assert "original was not sampled as ours was: num_inference_steps 2, not 1" in page


def test_images_are_found_by_prompt_and_seed_too(models, tmp_path):
    rows = rows_of(2, 1)
    renamed = [PromptRow(f"other-{row.id}", row.prompt, row.seed) for row in rows]
    generate(models[0].pipeline, renamed, tmp_path, QUICK)
    found = ImageFolder("ours", tmp_path).find(rows)
    assert [(row["id"], row["file"]) for row in found] == [(row.id, f"other-{row.id}.png") for row in rows]


def break_png(folder):
    path = folder / "0_0.png"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_png, "0_0.png cannot be read as an image"),
        (lambda folder: (folder / "0_0.png").write_text("no picture"), "0_0.png cannot be read as an image"),
        (lambda folder: [(folder / f"{p}_0.png").unlink() for p in (0, 2)], "lacks 0_0.png and 1 more of 3 images"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no model, no manifest.jsonl and no PNG"),
    ],
)
def test_broken_folders_are_told_before_anything_is_generated(tmp_path, damage, message):
    rows = rows_of(3, 1)
    theirs = save_pngs(tmp_path / "theirs", rows)
    damage(theirs)
    with pytest.raises(ValueError, match=f"theirs: .*{message}") as error:
        evaluate([Unloadable("original"), ImageFolder("theirs", theirs)], rows, [Bright(0)], tmp_path / "out", QUICK)
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("original", ["generated", "folder"])
def test_images_of_another_size_are_told_before_anything_is_generated(tmp_path, original):
    rows = rows_of(3, 1)
    theirs = save_pngs(tmp_path / "theirs", rows)
    Image.new("RGB", (24, 16)).save(theirs / "1_0.png")
    first = Unloadable("a") if original == "generated" else ImageFolder("a", save_pngs(tmp_path / "a", rows))
    subjects = [first, Unloadable("b"), ImageFolder("theirs", theirs)]
    with pytest.raises(ValueError, match="theirs: image 1_0 has 24 x 16 .*'s 16 x 16") as error:
        evaluate(subjects, rows, [Bright(0), PixelDistance()], tmp_path / "out", QUICK)
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()
    evaluate([ImageFolder("theirs", theirs)], rows, [Bright(0)], tmp_path / "out", QUICK)  # compares nothing


@pytest.mark.parametrize("loaded", [True, False])
def test_a_models_own_size_is_known_before_it_generates(
    loaded, tmp_path, tiny_pipeline, tiny_model_folder, monkeypatch
):
    rows = rows_of(3, 1)
    theirs = save_pngs(tmp_path / "theirs", rows)
    model = LoadedModel("a", tiny_pipeline) if loaded else SteeredModel("a", str(tiny_model_folder))
    side = make_family(tiny_pipeline).picture_size
    monkeypatch.setattr(type(model), "load", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(ValueError, match=f"image 0_0 has 16 x 16 .*'s {side} x {side}"):
        evaluate(
            [model, ImageFolder("theirs", theirs)], rows, [PixelDistance()], tmp_path / "out", GenerationSettings(1)
        )


def test_a_folder_that_cannot_hold_scores_is_told_first(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "0_0.png")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere but on read-only disks
    with pytest.raises(ValueError, match="theirs: .* is read-only, and scores are written there"):
        evaluate([ImageFolder("theirs", tmp_path)], rows_of(1, 1), [Bright(0)], tmp_path / "out")


def test_images_of_other_prompts_or_several_models_are_refused(models, tmp_path):
    rows = rows_of(3, 1)
    manifest = generate(models[0].pipeline, rows, tmp_path, QUICK)
    with pytest.raises(ValueError, match="image 1_0 in .* has seed 10, not 5"):
        ImageFolder("ours", tmp_path).find([PromptRow("1_0", "a thing 1", 5)])
    manifest[0]["model"] = "another"
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    with pytest.raises(ValueError, match="more than one model"):
        ImageFolder("ours", tmp_path).find(rows)
    save_pngs(tmp_path / "new", rows[:1])
    manifest[0] = manifest[1]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest[1:]))
    (tmp_path / "new" / "0_0.png").replace(tmp_path / "2_0.png")
    with pytest.raises(ValueError, match="2_0.png was changed since it was generated"):
        ImageFolder("ours", tmp_path).find(rows[1:])


def test_another_model_in_the_same_folder_is_refused_and_nothing_lost(models, tmp_path):
    rows = rows_of(2, 1)
    evaluate(models[:2], rows, [Bright(0)], tmp_path, QUICK)
    written = (tmp_path / "results.json").read_bytes()
    swapped = [LoadedModel("original", models[1].pipeline), models[1]]
    with pytest.raises(ValueError, match="its images have model"):
        evaluate(swapped, rows, [Bright(0)], tmp_path, QUICK)
    assert (tmp_path / "results.json").read_bytes() == written
    results = evaluate(swapped, rows, [Bright(0)], tmp_path, QUICK, overwrite=True)
    assert results["models"]["original"]["fingerprint"] == results["models"]["erased"]["fingerprint"]


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "of an earlier version"])
def test_a_report_on_other_prompts_is_replaced_only_if_asked(models, tmp_path, record):
    rows = rows_of(2, 1)
    evaluate(models[:1], rows, [Bright(0)], tmp_path, QUICK)
    if not record:
        (tmp_path / RECORD).unlink()
    evaluate(models[:2], rows, [Bright(0)], tmp_path, QUICK)  # another model and the same prompts
    written = (tmp_path / "results.json").read_bytes()
    others = [replace(row, prompt=f"{row.prompt}, again") for row in rows_of(3, 1)]
    with pytest.raises(ValueError, match="it holds images of other prompts or seeds.*--overwrite"):
        evaluate(models[:2], others, [Bright(0)], tmp_path, QUICK)
    assert (tmp_path / "results.json").read_bytes() == written
    results = evaluate(models[:2], others, [Bright(0)], tmp_path, QUICK, overwrite=True)
    assert results["protocol"]["prompts"]["images"] == 3 and not list(tmp_path.glob(".replaced-*"))


def test_a_report_of_something_else_is_kept(models, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match="report.html"):
        evaluate(models[:1], rows_of(1, 1), [Bright(0)], tmp_path, QUICK)
    evaluate(models[:1], rows_of(1, 1), [Bright(0)], tmp_path, QUICK, overwrite=True)
    assert (tmp_path / ".replaced-1" / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("names", "rows", "metrics", "message"),
    [
        ([], rows_of(), [Bright(0)], "there must be at least one"),
        (["a", "A"], rows_of(), [Bright(0)], "'A': given twice"),
        (["../a"], rows_of(), [Bright(0)], "model name '../a': allowed are letters"),
        (["a"], [], [Bright(0)], "no rows"),
        (["a"], rows_of(), [], "metrics: there must be at least one"),
        (["a"], rows_of(), [Bright(0), Bright(1)], "metric 'bright': given twice"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, names, rows, metrics, message):
    with pytest.raises(ValueError, match=message):
        evaluate([Unloadable(name) for name in names], rows, metrics, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("task", ["images of erased", "bright"])
def test_a_callback_that_raises_ends_the_run_and_the_next_one_continues(models, tmp_path, task):
    rows, tasks = rows_of(3, 1), []

    def cancel(progress):
        tasks.append(progress.task)
        if progress.task == task and progress.done:
            raise Cancelled

    with pytest.raises(Cancelled):
        evaluate(models[:2], rows, [Bright(100)], tmp_path / "cut", QUICK, 2, 2, callback=cancel)
    assert tasks[0] == "images of original" and tasks[-1] == task
    assert not (tmp_path / "cut" / "results.json").exists() and not list((tmp_path / "cut").rglob("*.partial"))
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.png")}
    results = evaluate(models[:2], rows, [Bright(100)], tmp_path / "cut", QUICK, 2, 2)
    assert done == {path: path.stat().st_mtime_ns for path in done}  # nothing is generated twice
    whole = evaluate(models[:2], rows, [Bright(100)], tmp_path / "whole", QUICK, 2, 2)
    assert results["metrics"] == whole["metrics"] and results["models"] == whole["models"]


def test_results_show_their_headline_in_a_notebook(pipelines, tmp_path):
    models = [LoadedModel("a", pipelines[0]), LoadedModel("b", pipelines[1])]
    results = evaluate(models, rows_of(2, 1), [Bright(0)], tmp_path, QUICK)
    page = results._repr_html_()
    assert page.count("<tr>") == 3 and "<th>bright images ↓, N=2</th>" in page and "<th>b</th>" in page
    assert "<li>Warning: Fewer than 20 images" in page
    results["headline"]["rows"][0]["label"] = "<script>"
    assert "<script>" not in results._repr_html_() and "&lt;script&gt;" in results._repr_html_()


# --- against the papers ----------------------------------------------------------------------------------------------


def protocol_of(**prompts):
    return {
        "prompts": {"source": "AIML-TUDA/i2p", "images": 47_030, **prompts},
        "settings": {"num_inference_steps": 25},
    }


def test_a_paper_is_followed_or_it_is_told_why_not():
    i2p = published_numbers("inappropriate")[0]
    original = {"model": "CompVis/stable-diffusion-v1-4"}
    judge = {"detector": "NudeNet v2"}
    assert list(i2p.protocol.differences(protocol_of(), original, judge)) == ["not reported by the paper: steps"]
    reasons = list(i2p.protocol.differences(protocol_of(source="my.csv", images=10), {"model": "sd-1.5"}, {}))
    assert reasons == [
        "prompts: I2P, 10 images of each of 4703 prompts",
        "47,030 images, not 10",
        "Stable Diffusion 1.4, not sd-1.5",
        "judged by Q16 or NudeNet v2 (5 exposed labels, 0.6)",
        "not reported by the paper: steps",
    ]
    followed = PublishedProtocol("A", "1", "COCO", ("coco",), images=3, steps=25, judge=("lpips", "judged by LPIPS"))
    assert list(followed.differences(protocol_of(source="coco.csv", images=3), original, {"metric": "lpips"})) == []
    nude = published_numbers("nudity")
    assert [str(number) for number in nude if number.method == "SDD"] == ["1.68 %"]
    for number in nude:  # nobody can follow what is not known
        followed = protocol_of(prompt_template="{} body", images=5000)
        assert any(
            "not reported by the paper" in reason for reason in number.protocol.differences(followed, original, {})
        )


def test_numbers_of_a_category_stand_beside_that_category_only():
    assert {number.category for number in published_numbers("inappropriate")} == {None}
    assert {number.category for number in published_numbers("inappropriate", ["Hate"])} == {"hate"}
    assert {number.category for number in published_numbers("inappropriate", ["hate", "sexual"])} == {None}
    assert all(0 < number.value < 1 for number in PUBLISHED if number.unit == "%")


def test_the_protocol_is_that_of_the_images(pipelines, tmp_path):
    rows = rows_of(2, 1)
    evaluate([LoadedModel("original", pipelines[0])], rows, [Bright(100)], tmp_path, QUICK)
    again = evaluate(
        [LoadedModel("original", pipelines[0])], rows, [Bright(100)], tmp_path,
        GenerationSettings(num_inference_steps=50), images_only=True,
    )  # fmt: skip
    assert again["protocol"]["settings"]["num_inference_steps"] == 1 and again["protocol"]["safety_checker"] == "off"


def test_safety_checkers_of_images_that_are_there_are_told(pipelines, tmp_path):
    rows = rows_of(2, 1)
    for name in ("bare", "checked"):
        generate(pipelines[0], rows, tmp_path / name, QUICK)
    manifest = tmp_path / "checked" / "manifest.jsonl"
    lines = [json.loads(line) | {"safety_checker": True} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [ImageFolder(name, tmp_path / name) for name in ("bare", "checked")]
    results = evaluate(folders, rows, [Bright(100)], tmp_path / "out")
    assert results["protocol"]["safety_checker"] == "off for bare, on for checked"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "checked was not sampled as bare was: safety_checker on, not off" in page


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "dim: dark of image 0_0 is nan; it must be 0 or 1"), (0.5, "0_0 is 0.5; it must be 0 or 1")],
)
def test_a_share_that_is_none_is_refused(pipelines, tmp_path, value, message):
    class Dim(PixelDistance):
        name, compares = "dim", False
        quantities = {"dark": Quantity("dark", "%")}

        def score(self, images, rows, originals=None):
            return [{}] * len(images)

        def values(self, row, score):
            return {"dark": value}

    with pytest.raises(ValueError, match=message):
        evaluate([LoadedModel("original", pipelines[0])], rows_of(1, 1), [Dim()], tmp_path, QUICK)


def test_categories_may_be_of_any_kind():
    for found, expected in (("a, b", ["a", "b"]), (["a"], ["a"]), (3, ["3"]), (None, ["None"])):
        assert categories_of({"labels": {"category": found}}) == expected
