"""`diffusers-safe evaluate` through the real command."""

import json

import pytest
from PIL import Image

from diffusers_safe import cli
from diffusers_safe.commands.evaluate import EvaluateArguments, read_models
from diffusers_safe.emoji.evaluation import SETTINGS, Erased
from diffusers_safe.generation.folders import ImageFolder
from diffusers_safe.generation.models import SteeredModel
from scripts import in_two_processes


QUICK = ("--num_inference_steps", "2", "--height", "16", "--width", "16", "--metrics", "pixel_distance")
PROMPTS = ("--prompts", "a knife", "a cat", "--images_per_prompt", "2")


def evaluate(folder, *options):
    cli.main(["evaluate", "--output_dir", str(folder), *map(str, options)])
    return json.loads((folder / "results.json").read_text())


def test_models_of_a_yaml_file_and_images_only(tiny_model_folder, tmp_path, capsys, monkeypatch):
    table = tmp_path / "models.yaml"
    table.write_text(
        f"- {{name: original, model: {tiny_model_folder}}}\n"
        f"- {{name: negative prompt, model: {tiny_model_folder}, negative_prompt: a weapon}}\n"
        f"- {{name: SLD, model: {tiny_model_folder}, safety: max, safety_concept: a weapon}}\n"
    )
    results = evaluate(tmp_path / "out", "--models", table, *PROMPTS, *QUICK)
    distances = results["metrics"]["pixel_distance"]["estimates"]
    assert distances.keys() == {"negative prompt", "SLD"}
    assert all(0 < found["pixel_distance"]["value"] < 1 for found in distances.values())
    models = results["models"]
    assert models["negative prompt"]["settings"]["negative_prompt"] == "a weapon"
    assert models["SLD"]["settings"]["call"]["safety_concept"] == "a weapon"
    assert models["original"]["settings"]["num_inference_steps"] == 2 and models["SLD"]["images"] == 4
    told = capsys.readouterr().out
    assert "|  | pixel distance ↓, N=4 |\n" in told and "report.html" in told
    assert "images of original" not in told

    monkeypatch.setattr(SteeredModel, "load", None)
    again = evaluate(tmp_path / "out", "--models", table, *PROMPTS, *QUICK, "--images_only", "--blur", "all")
    assert again["metrics"] == results["metrics"]
    assert (tmp_path / "out" / "report.html").read_text().count('class="blur"') == 12


def test_folders_of_images_need_no_prompts(tiny_model_folder, tmp_path):
    for name, prompt in (("a", "a weapon"), ("b", "a cat")):
        where = ("--model", tiny_model_folder, "--output_dir", str(tmp_path / name))
        cli.main(["generate", *where, *PROMPTS, *QUICK[:6], "--negative_prompt", prompt])
    models = (f"original={tmp_path / 'a'}", f"{tmp_path / 'b'}")
    results = evaluate(tmp_path / "out", "--models", *models, "--metrics", "pixel_distance")
    assert results["metrics"]["pixel_distance"]["estimates"]["b"]["pixel_distance"]["n"] == 4
    assert results["protocol"]["prompts"]["source"] == "images of original"


def test_a_model_draws_as_the_images_of_the_original_were_drawn(tiny_model_folder, tmp_path, capsys):
    table = tmp_path / "own.csv"
    table.write_text("prompt,guidance_scale,width,height\na cat,3,16,16\na dog,5,24,16\n")
    model = ("--model", tiny_model_folder, "--num_inference_steps", "2")
    cli.main(["generate", *model, "--prompts", str(table), "--output_dir", str(tmp_path / "a")])
    models = ("--models", f"original={tmp_path / 'a'}", f"b={tiny_model_folder}")
    results = evaluate(tmp_path / "out", *models, "--num_inference_steps", "2", *QUICK[-2:])
    assert results["metrics"]["pixel_distance"]["estimates"]["b"]["pixel_distance"]["value"] < 1e-4  # rounding
    with pytest.raises(SystemExit) as stop:
        evaluate(tmp_path / "third", *models, *QUICK, "--row_settings", "false")
    assert stop.value.code == 2 and "has 16 x 16 pixels, the original's 24 x 16" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_preset_stands_in_for_defaults_and_gives_way(tiny_model_folder, tmp_path):
    prompts = ("--prompts", *(f"thing {i}" for i in range(20)), "--preset", "smoke", "--num_inference_steps", "1")
    results = evaluate(
        tmp_path, "--models", f"original={tiny_model_folder}", f"b={tiny_model_folder}", *prompts, *QUICK[2:]
    )
    assert results["protocol"]["prompts"]["different"] == 8
    assert results["protocol"]["settings"]["num_inference_steps"] == 1


def test_models_are_read_from_words(tiny_model_folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0_0.png")
    subjects = read_models([f"a={tiny_model_folder}", f"b={tmp_path}", "user/name"], "float16")
    assert subjects[0] == SteeredModel("a", tiny_model_folder, dtype="float16")
    assert subjects[1] == ImageFolder("b", tmp_path)
    assert subjects[2] == SteeredModel("name", "user/name", dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "a={model}", "a={other}", *PROMPTS], "model name 'a': given twice; write name=MODEL"),
        (["--models", "{model}", "{other}", *PROMPTS], "given twice; write name=MODEL, with another name for each"),
        (["--models", "a={model}", *PROMPTS], "metric 'pixel_distance': compares models with the first one, and a is"),
        (["--models", "={model}", *PROMPTS], "write name=PATH"),
        (["--models", "a=nowhere/at-all-here", *PROMPTS], "no folder or Hub repository of a diffusers pipeline"),
        (["--models", "a={empty}", *PROMPTS], "holds no model, no manifest.jsonl and no PNG"),
        (["--models", "a={model}"], "prompts: none given, and a is not a folder of images"),
        (
            ["--models", "a={model}", *PROMPTS, "--metrics", "magic"],
            "metric 'magic': unknown; allowed are nudity",
        ),
        (["--models", "a={model}", *PROMPTS, "--preset", "grand"], "preset 'grand': unknown; allowed are smoke"),
        (["--models", "a={model}", *PROMPTS, "--blur", "some"], "blur 'some': unknown; allowed are flagged"),
        (["--models", "a={model}", *PROMPTS, "--batch_size", "0"], "batch_size 0: must be at least 1"),
        (["--models", "a={model}", *PROMPTS, "--images_only"], "a: {out}/images/a is not a folder of images"),
        (["--models", "{no_list}", *PROMPTS], "must be a list of mappings"),
        (["--models", "{broken}", *PROMPTS], "broken.yaml: cannot be read as YAML"),
        (["--models", "{unknown}", *PROMPTS], "a has colour; allowed are name, model, safety"),
        (["--models", "{nameless}", *PROMPTS], "needs a name, and either model or images"),
        (["--models", "{safety}", *PROMPTS], "'a': safety 'extreme': unknown"),
        (["--models", "{type}", *PROMPTS], "'a': lora_scale 'much': must be a number"),
        (["--models", "{letters}", *PROMPTS], "'a': editing_prompt (dict): must be a list of texts"),
        (["--models", "{word}", *PROMPTS], "'a': negative_prompt (list): must be text"),
        (["--models", "{images}", "--max_prompts", "1"], "max_prompts 1: needs --prompts"),
        (["--models", "{images}", "--prompt_template", "{{}} x"], "prompt_template {{}} x: needs"),
        (["--models", "a={model}", *PROMPTS, "--height", "100", "--width", "64"], "height is 100; it must be a mult"),
        (["--models", "{type}", "b={model}", *PROMPTS], "a file must be the only one"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tiny_model_folder, tmp_path, capsys, options, message):
    files = {
        "no_list": "name: a",
        "broken": "- {name: [",
        "unknown": f"- {{name: a, model: {tiny_model_folder}, colour: red}}",
        "nameless": f"- {{model: {tiny_model_folder}}}",
        "safety": f"- {{name: a, model: {tiny_model_folder}, safety: extreme}}",
        "letters": f"- {{name: a, model: {tiny_model_folder}, editing_prompt: {{a: b}}}}",
        "word": f"- {{name: a, model: {tiny_model_folder}, negative_prompt: [no]}}",
        "images": f"- {{name: a, images: {tmp_path}}}",
        "type": f"- {{name: a, model: {tiny_model_folder}, lora: x.safetensors, lora_scale: much}}",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / f"{name}.yaml" for name in files}
    places |= {
        "model": tiny_model_folder,
        "other": tiny_model_folder,
        "empty": tmp_path / "empty",
        "out": tmp_path / "out",
    }
    options = [option.format(**places) for option in options]
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--output_dir", str(tmp_path / "out"), "--metrics", "pixel_distance", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message.format(**places) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_one_line_and_what_is_there_stays(tiny_model_folder, tmp_path, capsys):
    models = ("--models", f"original={tiny_model_folder}", f"b={tiny_model_folder}")
    evaluate(tmp_path, *models, *PROMPTS, *QUICK)
    results = (tmp_path / "results.json").read_bytes()
    png = next((tmp_path / "images" / "b").glob("*.png"))
    png.write_bytes(b"broken")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate(tmp_path, *models, *PROMPTS, *QUICK, "--images_only")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith(f"error: b: {png} cannot be read as an image")
    assert (tmp_path / "results.json").read_bytes() == results


def test_a_used_folder_is_refused_before_any_work(tiny_model_folder, tmp_path, capsys, monkeypatch):
    models = ("--models", f"original={tiny_model_folder}", f"b={tiny_model_folder}")
    evaluate(tmp_path, *models, *PROMPTS, *QUICK)
    assert "* Warning: Fewer than 20 images" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(SteeredModel, "load", None)
    for changes, message in (
        (
            (*models, "--prompts", "a dog", *QUICK),
            "it holds images of other prompts or seeds, such as 00000-a-knife_0",
        ),
        ((*models, *PROMPTS, "--seed", "1", *QUICK), "it holds images of other prompts or seeds"),
        ((*models, *PROMPTS, *QUICK, "--num_inference_steps", "3"), "have num_inference_steps 2, not 3"),
        ((*models[:2], f"c={tiny_model_folder}", *PROMPTS, *QUICK), "its report has a model 'b', which is not among"),
        ((models[0], models[2], models[1], *PROMPTS, *QUICK), "its report compares with 'original', not with 'b'"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate(tmp_path, *changes)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert f"error: output_dir {tmp_path}: " in error and message in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_processes_share_the_generating_and_one_measures(tiny_model_folder, tmp_path):
    words = ["--models", f"a={tiny_model_folder}", f"b={tiny_model_folder}", *PROMPTS, *QUICK]
    script = tmp_path / "both.py"  # a name that shadows no library
    script.write_text("from diffusers_safe.commands.evaluate import main\n\nmain()\n")
    done = in_two_processes(str(script), [*words, "--output_dir", str(tmp_path / "two")], tmp_path)
    assert done.stdout.count("| pixel distance ↓, N=") == 1
    alone = evaluate(tmp_path / "one", *words)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["metrics"] == alone["metrics"]


def test_emoji_bring_prompts_judge_sampling_and_the_original(tiny_model_folder, tmp_path, monkeypatch):
    args = EvaluateArguments(models=[tiny_model_folder], emoji="banana")
    assert [(subject.name, subject.model) for subject in args.made_models] == [
        ("original", "emoji"),
        ("erased", tiny_model_folder),
    ]
    assert args.rows == Erased("banana").rows(3, 0)
    assert (args.settings.num_inference_steps, args.settings.guidance_scale) == (
        SETTINGS.num_inference_steps,
        SETTINGS.guidance_scale,
    )
    many = EvaluateArguments(
        models=[f"a={tiny_model_folder}", f"b={tiny_model_folder}"], emoji="sketch", guidance_scale=2, seed=5
    )
    assert [subject.name for subject in many.made_models] == ["a", "b"] and many.settings.guidance_scale == 2
    assert (args.blur, many.blur) == ("none", "none")
    plain = EvaluateArguments(models=[tiny_model_folder], prompts=["a cat"], metrics=["pixel_distance"])
    settings = plain.settings
    assert (plain.images_per_prompt, settings.num_inference_steps, settings.guidance_scale) == (1, 25, 7.5)
    assert plain.blur == "flagged"
    with pytest.raises(ValueError, match="blur 'some': unknown; allowed are flagged, all, none"):
        EvaluateArguments(models=[tiny_model_folder], emoji="banana", blur="some")
    assert many.rows == Erased("sketch").rows(3, 5)

    monkeypatch.setattr("diffusers_safe.emoji.evaluation.OBJECTS", ["cat", "banana"])
    monkeypatch.setattr("diffusers_safe.emoji.evaluation.GROUPS", ["weapon"])
    options = ("--emoji", "banana", "--num_inference_steps", "1", "--images_per_prompt", "1", "--batch_size", "24")
    results = evaluate(tmp_path / "out", "--models", f"a={tiny_model_folder}", f"b={tiny_model_folder}", *options)
    assert results["metrics"].keys() == {"emoji_recognition", "emoji_distance"}
    assert results["metrics"]["emoji_recognition"]["estimates"]["b"]["concept"]["n"] == 24
    told = {"source": "--emoji banana", "images_per_prompt": 1, "seed": 0, "images": 26}
    assert told.items() <= results["protocol"]["prompts"].items()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "the following arguments are required: --metrics"),
        ({"emoji": "zebra"}, "emoji 'zebra': unknown; allowed are weapon"),
        ({"emoji": "banana", "prompts": ["a cat"]}, "prompts a cat: not allowed with --emoji"),
        ({"emoji": "banana", "max_prompts": 3}, "max_prompts 3: needs --prompts, without --emoji"),
    ],
)
def test_what_does_not_go_with_emoji(tiny_model_folder, options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(models=[tiny_model_folder], **options)
