import hashlib
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from diffusers_safe.generation import generate as generation
from diffusers_safe.generation.folders import common_settings
from diffusers_safe.generation.generate import generate, pipeline_fingerprint
from diffusers_safe.generation.manifest import load_images, read_manifest
from diffusers_safe.generation.processes import launched_processes
from diffusers_safe.generation.rows import GenerationSettings, PromptRow
from diffusers_safe.output_folders import RECORD


QUICK = GenerationSettings(num_inference_steps=2, guidance_scale=4.0)


class SafetyChecker(torch.nn.Module):
    """One that objects to everything."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images, clip_input):
        return 0 * images, [True] * len(images)


def rows_of(count):
    return [PromptRow(f"image-{i}", ["a knife", "a cat"][i % 2], seed=100 + i, labels={"i": i}) for i in range(count)]


def rows_of_many_kinds(count):
    """Every third with a guidance of its own, every fourth of another size."""
    return [
        PromptRow(
            row.id,
            row.prompt,
            row.seed,
            row.labels,
            guidance_scale=2.5 if i % 3 == 0 else None,
            **({"height": 64, "width": 96} if i % 4 == 0 else {}),
        )
        for i, row in enumerate(rows_of(count))
    ]


def files_of(folder):
    """Name -> hash of every file, but for the record."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != RECORD]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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


def test_rows_of_their_own_guidance_and_size_are_batched_with_their_like(tiny_pipeline, tmp_path, monkeypatch):
    sample, batches = generation._sample, []

    def watched(pipeline, rows, settings):
        batches.append(([row.id for row in rows], settings.guidance_scale, settings.height, settings.width))
        return sample(pipeline, rows, settings)

    monkeypatch.setattr(generation, "_sample", watched)
    rows = rows_of_many_kinds(8)
    manifest = generate(tiny_pipeline, rows, tmp_path, QUICK, batch_size=2)
    assert batches == [
        (["image-0"], 2.5, 64, 96),
        (["image-1", "image-2"], 4.0, None, None),
        (["image-5", "image-7"], 4.0, None, None),
        (["image-3", "image-6"], 2.5, None, None),
        (["image-4"], 4.0, 64, 96),
    ]
    assert [row["id"] for row in manifest] == [row.id for row in rows]
    assert manifest[0]["settings"]["guidance_scale"] == 2.5 and manifest[1]["settings"]["guidance_scale"] == 4.0
    assert load_images(tmp_path, manifest[:1]).shape == (1, 64, 96, 3)
    assert load_images(tmp_path, manifest[1:3]).shape == (2, 64, 64, 3)

    # Fewer rows of the same folder are fine; a row of other guidance is another image.
    assert generate(tiny_pipeline, rows[:3], tmp_path, QUICK) == manifest[:3]
    other = PromptRow("image-0", "a knife", 100, {"i": 0}, guidance_scale=3.0, height=64, width=96)
    with pytest.raises(ValueError, match="its images have settings .*2.5.*, not .*3.0"):
        generate(tiny_pipeline, [other], tmp_path, QUICK)


@pytest.mark.parametrize("other_batches", [False, True])
def test_killed_at_any_moment_it_comes_out_the_same(tiny_pipeline, tmp_path, monkeypatch, other_batches):
    rows, chance = rows_of_many_kinds(10), random.Random(0)
    generate(tiny_pipeline, rows, tmp_path / "whole", QUICK, batch_size=3)
    whole, folder = files_of(tmp_path / "whole"), tmp_path / "killed"
    save, manifest = generation.save_png, folder / "manifest.jsonl"

    for _ in range(5):
        left = [chance.randint(0, 3), chance.random() < 0.5]  # images until the kill, and whether the last is saved

        def save_until_killed(*arguments, left=left):
            left[0] -= 1
            if left[0] < 0 and not left[1]:
                raise KeyboardInterrupt
            entry = save(*arguments)
            if left[0] < 0:
                raise KeyboardInterrupt
            return entry

        monkeypatch.setattr(generation, "save_png", save_until_killed)
        before = files_of(folder) if folder.exists() else {}
        with pytest.raises(KeyboardInterrupt):
            generate(tiny_pipeline, rows, folder, QUICK, batch_size=chance.choice([1, 2, 4]) if other_batches else 3)
        after = files_of(folder)
        assert {name: after[name] for name in before if name.endswith(".png")}.items() <= before.items()
        manifest.write_bytes(manifest.read_bytes()[: -chance.randint(1, 200)])  # what a power cut lost
        (folder / ".image-9.png.partial").write_bytes(b"half")

    monkeypatch.setattr(generation, "save_png", save)
    finished = generate(tiny_pipeline, rows, folder, QUICK, batch_size=3)
    assert files_of(folder).keys() == whole.keys() and [row["id"] for row in finished] == [row.id for row in rows]
    if other_batches:
        for row in rows:
            images = [load_images(tmp_path / name, [{**entry, "id": row.id}]) for name, entry in (
                ("whole", next(e for e in read_manifest(tmp_path / "whole") if e["id"] == row.id)),
                ("killed", next(e for e in finished if e["id"] == row.id)),
            )]  # fmt: skip
            assert np.abs(images[0].astype(int) - images[1]).max() <= 1
    else:
        assert files_of(folder) == whole


def in_processes(count, monkeypatch, work):
    """`work(rank)` in threads that are processes to `generate`; what each returned or raised."""
    barrier, own = threading.Barrier(count), threading.local()

    def state():
        return SimpleNamespace(
            process_index=own.rank, num_processes=count, is_main_process=own.rank == 0,
            wait_for_everyone=lambda: barrier.wait(60),
        )  # fmt: skip

    def run(rank):
        own.rank = rank
        try:
            return work(rank)
        except BaseException as error:
            barrier.abort()
            return error

    monkeypatch.setattr(generation, "launched_processes", state)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_processes_share_a_folder_and_another_number_of_them_goes_on(make_tiny_pipeline, tmp_path, monkeypatch):
    rows, pipelines = rows_of_many_kinds(9), [make_tiny_pipeline() for _ in range(3)]
    with monkeypatch.context() as patch:
        expected = in_processes(1, patch, lambda _: generate(pipelines[0], rows, tmp_path / "1", QUICK, batch_size=2))
        shared = in_processes(
            3, patch, lambda rank: generate(pipelines[rank], rows, tmp_path / "3", QUICK, batch_size=2)
        )
    assert shared == expected * 3 and files_of(tmp_path / "3") == files_of(tmp_path / "1")

    decode, folder = pipelines[1].vae.decode, tmp_path / "killed"

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines[1].vae, "decode", killed)
        outcome = in_processes(2, patch, lambda rank: generate(pipelines[rank], rows, folder, QUICK, batch_size=2))
        assert isinstance(outcome[1], KeyboardInterrupt)
    assert (folder / ".manifest.jsonl.0").exists() and pipelines[1].vae.decode == decode
    with monkeypatch.context() as patch:
        in_processes(1, patch, lambda _: generate(pipelines[0], rows, folder, QUICK, batch_size=2))
    assert files_of(folder) == files_of(tmp_path / "1")


def test_two_runs_do_not_share_a_folder(tiny_pipeline, tmp_path, monkeypatch):
    """Unless they were launched together."""
    sample, refused = generation._sample, []

    def while_another_begins(*arguments):
        with pytest.raises(ValueError, match="another run is at work there") as error:
            generate(tiny_pipeline, rows_of(1), tmp_path, QUICK)
        refused.append(error)
        return sample(*arguments)

    monkeypatch.setattr(generation, "_sample", while_another_begins)
    generate(tiny_pipeline, rows_of(1), tmp_path, QUICK)
    assert len(refused) == 1 and sorted(files_of(tmp_path)) == ["image-0.png", "manifest.jsonl"]


def test_processes_that_do_not_know_of_each_other_are_refused(tiny_pipeline, tmp_path, monkeypatch):
    launched_processes()  # one
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but they are not connected"):
        generate(tiny_pipeline, rows_of(1), tmp_path / "new", QUICK)
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_name_is_not_the_current_folder(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("", " "):
        with pytest.raises(ValueError, match="output_dir .*: is empty; name a folder"):
            generate(tiny_pipeline, rows_of(1), name, QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", [{"a": np.float32(1)}, {"a": "\ud800"}, {"a": float("nan")}, {"a": torch.ones(2)}])
def test_labels_and_calls_that_no_manifest_holds_are_refused(labels):
    with pytest.raises(ValueError, match="row x: labels .* must be JSON values"):
        PromptRow("x", "a cat", 0, labels)
    with pytest.raises(ValueError, match="call .* must be JSON values"):
        GenerationSettings(call=labels)


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
        ([PromptRow("a", "a cat", 0), PromptRow("A", "a dog", 1)], "row id A occurs twice"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(tiny_pipeline, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_pipeline, rows, tmp_path / "new", QUICK)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "../a"}, "is no file name"),
        ({"id": ""}, "is no file name"),
        ({"id": "a" * 201}, "is no file name"),
        ({"seed": -1}, "must lie between"),
        ({"seed": 2**64}, "must lie between"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan: must be a finite number"),
        ({"height": 64}, "a has height 64, width None; give both or neither"),
        ({"height": 64, "width": 60}, "a has width 60; it must be a multiple of 8"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        PromptRow(**{"id": "a", "prompt": "a cat", "seed": 0, **row})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale nan: must be a finite number"),
        ({"height": 100, "width": 64}, "height is 100; it must be a multiple of 8"),
    ],
)
def test_settings_that_draw_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)


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
    assert [row["safety_checker"] for row in rows] == [True, True]
    assert common_settings(rows)["safety_checker"] == "on"
    with pytest.raises(ValueError, match="safety_checker True, not None; give another folder, or --overwrite"):
        generate(tiny_pipeline, rows_of(4), tmp_path, QUICK)


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
    for lines, message in (
        (b'{"id": "a"}\nnot json\n', "line 2 is broken; run the generation again"),
        (b"\xff\n", "line 1 is broken"),
        (b'{"id": "a"}\n', "no manifest of generated images; line 1 has no prompt"),
        (b"7\n", "no manifest of generated images; line 1 has no fields"),
    ):
        (tmp_path / "manifest.jsonl").write_bytes(lines)
        with pytest.raises(ValueError, match=message):
            read_manifest(tmp_path)


def with_foreign_images(folder, count):
    folder.mkdir()
    for row in rows_of(count):
        Image.new("RGB", (8, 8), "red").save(folder / f"{row.id}.png")
    return files_of(folder)


def test_images_that_no_manifest_lists_are_refused_and_never_lost(tiny_pipeline, tmp_path):
    folder = tmp_path / "theirs"
    before = with_foreign_images(folder, 2)
    with pytest.raises(ValueError, match="holds .*png, which no manifest.jsonl lists; .*--overwrite"):
        generate(tiny_pipeline, rows_of(2), folder, QUICK)
    assert files_of(folder) == before
    rows = generate(tiny_pipeline, rows_of(2), folder, QUICK, overwrite=True)
    assert files_of(folder / ".replaced-1") == before and len(load_images(folder, rows)) == 2


def test_an_image_that_is_put_into_the_folder_is_kept(tiny_pipeline, tmp_path):
    generate(tiny_pipeline, rows_of(1), tmp_path, QUICK)
    name = f"{rows_of(2)[1].id}.png"
    Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    rows = generate(tiny_pipeline, rows_of(2), tmp_path, QUICK)
    assert Image.open(tmp_path / ".replaced-1" / name).size == (8, 8) and len(load_images(tmp_path, rows)) == 2


def test_overwrite_deletes_listed_images_and_keeps_changed_ones(tiny_pipeline, make_tiny_pipeline, tmp_path):
    generate(tiny_pipeline, rows_of(3), tmp_path, QUICK)
    (tmp_path / "mine.txt").write_text("mine")
    changed = f"{rows_of(3)[2].id}.png"
    Image.new("RGB", (8, 8), "red").save(tmp_path / changed)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="its images have model .*--overwrite"):
        generate(make_tiny_pipeline(1), rows_of(1), tmp_path, QUICK)
    assert files_of(tmp_path) == before
    generate(make_tiny_pipeline(1), rows_of(1), tmp_path, QUICK, overwrite=True)
    after = files_of(tmp_path)
    assert after.keys() == {f"{rows_of(1)[0].id}.png", "manifest.jsonl", "mine.txt", changed}
    assert after[changed] == before[changed] and len(read_manifest(tmp_path)) == 1


@pytest.mark.parametrize("tail", [b"", b"\xc3", b"\0\0"])
def test_a_torn_manifest_costs_no_more_than_its_last_line(tiny_pipeline, tmp_path, tail):
    generate(tiny_pipeline, rows_of(2), tmp_path, QUICK)
    path = tmp_path / "manifest.jsonl"
    whole, before = path.read_bytes(), files_of(tmp_path)
    for cut in (1, 2, 30, 100):
        path.write_bytes(whole[:-cut] + tail)
        generate(tiny_pipeline, rows_of(2), tmp_path, QUICK)
        assert files_of(tmp_path) == before
    path.write_bytes(whole.replace(b"\n", b"\n\xff broken\n", 1))
    generate(tiny_pipeline, rows_of(2), tmp_path, QUICK)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_names_no_file_outside_of_its_folder(tiny_pipeline, tmp_path, overwrite):
    folder = tmp_path / "images"
    (row,) = generate(tiny_pipeline, rows_of(1), folder, QUICK)
    (folder / row["file"]).rename(tmp_path / "victim.png")
    (folder / "manifest.jsonl").write_text(json.dumps({**row, "file": "../victim.png"}) + "\n")
    with pytest.raises(ValueError, match="names a file outside") if not overwrite else nullcontext():
        generate(tiny_pipeline, rows_of(1), folder, QUICK, overwrite=overwrite)
    assert (tmp_path / "victim.png").is_file()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": []}, "line 1: id .. has a wrong type"),
        ({"prompt": {}}, "line 1: prompt .* has a wrong type"),
        ({"seed": "x"}, "line 1: seed .* has a wrong type"),
        ({"settings": "x"}, "line 1: settings .* has a wrong type"),
        ({"black": None}, "line 1: black .* has a wrong type"),
    ],
)
def test_a_damaged_line_of_a_manifest_is_named(tiny_pipeline, tmp_path, change, message):
    (row,) = generate(tiny_pipeline, [PromptRow("a", "a cat", 0)], tmp_path, QUICK)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({**row, **change}) + "\n")
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


def test_a_text_of_somebody_in_the_place_of_the_manifest_is_kept(tiny_pipeline, tmp_path):
    (tmp_path / "manifest.jsonl").write_text("my own text, no line break")
    with pytest.raises(ValueError, match="no manifest of generated images; it has no complete line"):
        generate(tiny_pipeline, [PromptRow("a", "a cat", 0)], tmp_path, QUICK)
    assert (tmp_path / "manifest.jsonl").read_text() == "my own text, no line break"


class Cancelled(Exception):
    pass


def test_a_callback_that_raises_ends_the_run_and_the_next_one_continues(tiny_pipeline, tmp_path):
    rows, seen = rows_of(5), []

    def cancel(progress):
        seen.append((progress.task, progress.done, progress.total))
        if progress.done >= 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(tiny_pipeline, rows, tmp_path / "cut", QUICK, batch_size=2, description="knives", callback=cancel)
    assert seen == [("knives", 0, 5), ("knives", 2, 5)]
    left = read_manifest(tmp_path / "cut")
    assert [row["id"] for row in left] == ["image-0", "image-1"] and len(load_images(tmp_path / "cut", left)) == 2
    assert not list((tmp_path / "cut").glob("*.partial")) and not (tmp_path / "cut" / ".lock").exists()

    seen.clear()
    generate(tiny_pipeline, rows, tmp_path / "cut", QUICK, batch_size=2, callback=lambda each: seen.append(each.done))
    assert seen == [2, 4, 5]
    generate(tiny_pipeline, rows, tmp_path / "whole", QUICK, batch_size=2)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda pipe: pipe.vae.to(torch.bfloat16),
            r"different dtypes \(vae bfloat16, text_encoder float32, unet float32",
        ),
        (lambda pipe: pipe.unet.mid_block.to(torch.bfloat16), "unet bfloat16 and float32"),
        (lambda pipe: pipe.unet.to("meta"), "unet: its weights are on the meta device"),
        (lambda pipe: setattr(pipe, "vae", None), "StableDiffusionPipeline of None: has no vae"),
    ],
)
def test_a_pipeline_of_parts_that_do_not_fit_is_told_in_one_line(make_tiny_pipeline, tmp_path, change, message):
    pipeline = make_tiny_pipeline()
    change(pipeline)
    with pytest.raises(ValueError, match=message) as error:
        generate(pipeline, rows_of(1), tmp_path, QUICK)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_an_xl_pipeline_without_its_second_text_encoder_is_told(make_tiny_xl_pipeline, tmp_path):
    pipeline = make_tiny_xl_pipeline()
    pipeline.text_encoder_2 = None
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline of None: has no text_encoder_2"):
        generate(pipeline, rows_of(1), tmp_path, QUICK)
