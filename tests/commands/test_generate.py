"""`diffusers-safe generate`: what is wrong is told before work, what is drawn is written down."""

import hashlib
import random
import subprocess
import sys
import time

import pytest

from diffusers_safe import cli
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.commands.generate import GenerateArguments
from diffusers_safe.generation.manifest import load_images, read_manifest
from diffusers_safe.pipelines.guidance import SafetyConfig
from scripts import environment, in_two_processes, succeed, words_of


def generate(model, folder, *options):
    steps = ("--num_inference_steps", "2", "--model", str(model), "--output_dir", str(folder))
    cli.main(["generate", *steps, *options])
    return read_manifest(folder)


def test_safe_and_stock_draw_different_pictures_of_the_same_seeds(tiny_model_folder, tmp_path):
    prompts = ("--prompts", "a knife", "a cat", "--images_per_prompt", "2", "--seed", "7")
    stock = generate(tiny_model_folder, tmp_path / "stock", *prompts)
    concept = ("--safety", "max", "--safety_concept", "a weapon")
    safe = generate(tiny_model_folder, tmp_path / "safe", *prompts, *concept)
    assert [(row["prompt"], row["seed"]) for row in safe] == [
        ("a knife", 7),
        ("a knife", 8),
        ("a cat", 7),
        ("a cat", 8),
    ]
    assert safe[0]["settings"]["call"] == {**SafetyConfig.MAX, "safety_concept": "a weapon"}
    assert stock[0]["settings"]["call"] == {}
    images = [load_images(tmp_path / name, rows) for name, rows in (("stock", stock), ("safe", safe))]
    assert images[0].shape == (4, 64, 64, 3) and (images[0] != images[1]).any()


def test_a_safe_repository_keeps_its_concept(make_tiny_pipeline, tmp_path):
    from diffusers_safe import StableDiffusionPipelineSafe

    parts = make_tiny_pipeline().components
    StableDiffusionPipelineSafe(**parts, requires_safety_checker=False, safety_concept="a gun").save_pretrained(
        tmp_path / "model"
    )
    rows = generate(tmp_path / "model", tmp_path / "images", "--prompts", "a knife", "--safety", "max")
    assert rows[0]["settings"]["call"]["safety_concept"] == "a gun"


def test_every_option_of_prompts_reaches_the_rows(tiny_model_folder, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text(
        "text,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
        'knife,"tools, kitchen",18446744073709551000,3.5,96,64\ncat,animals,5,2.5,96,64\n'
    )
    source = ("--prompts", str(table), "--prompt_column", "text", "--prompt_template", "a {} indoors")
    rows = generate(
        tiny_model_folder, tmp_path / "own", *source, "--categories", "tools", "--layout", "i2p",
        "--images_per_prompt", "2",
    )  # fmt: skip
    assert [(row["id"], row["prompt"], row["seed"]) for row in rows] == [
        ("00000-a-knife-indoors_0", "a knife indoors", 18446744073709551000),
        ("00000-a-knife-indoors_1", "a knife indoors", 18446744073709551001),
    ]
    assert rows[0]["labels"] == {"categories": ["tools", "kitchen"], "subject": "knife"}
    assert rows[0]["settings"]["guidance_scale"] == 3.5
    assert load_images(tmp_path / "own", rows).shape == (2, 64, 96, 3)
    (row,) = generate(
        tiny_model_folder, tmp_path / "ours", *source, "--max_prompts", "1", "--row_settings", "false",
        "--guidance_scale", "3", "--height", "64", "--width", "64",
    )  # fmt: skip
    assert row["settings"]["guidance_scale"] == 3 and load_images(tmp_path / "ours", [row]).shape == (1, 64, 64, 3)


def test_five_rows_of_a_prompt_are_five_different_images(tiny_model_folder, tmp_path, caplog):
    """Of a published list that has the seeds, but not the other columns of a known layout."""
    table = tmp_path / "five.csv"
    table.write_text(
        ",type,prompt,evaluation_seed\n" + "".join(f"{i},t,a cat,{i + 1}\n" for i in range(5)) + "5,t,,9\n"
    )
    rows = generate(tiny_model_folder, tmp_path / "images", "--prompts", str(table))
    assert [row["seed"] for row in rows] == [1, 2, 3, 4, 5] and len({row["sha256"] for row in rows}) == 5
    assert f"{table}: left out 1 row without a prompt (row 6)" in caplog.text


@pytest.mark.parametrize(("preset", "steps", "images"), [("smoke", 10, 8), ("quick", 25, 12), ("paper", 50, 120)])
def test_presets_are_defaults(tmp_path, preset, steps, images):
    table = tmp_path / "prompts.txt"
    table.write_text("".join(f"a cat {i}\n" for i in range(12)))
    arguments = parse_dataclass(GenerateArguments, argv=["--prompts", str(table), "--preset", preset])
    assert arguments.settings.num_inference_steps == steps and len(arguments.rows) == images
    words = ["--prompts", str(table), "--preset", preset, "--num_inference_steps", "7"]
    assert parse_dataclass(GenerateArguments, argv=words).settings.num_inference_steps == 7


KILLED = {"model": None, "num_inference_steps": 2, "batch_size": 2, "images_per_prompt": 10, "prompts": ["a cat", "b"]}


def files_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_five_times_and_in_two_processes_the_files_are_the_same(tiny_model_folder, tmp_path):
    words = words_of({**KILLED, "model": tiny_model_folder})
    module = ["-m", "diffusers_safe.commands.generate", *words, "--output_dir"]
    whole = succeed([sys.executable, *module, str(tmp_path / "whole")], tmp_path)
    assert "20 images in" in whole.stdout
    expected = files_of(tmp_path / "whole")
    assert len(expected) == 21

    in_two_processes("-m", [*module[1:], str(tmp_path / "two")], tmp_path)
    assert files_of(tmp_path / "two") == expected

    killed, chance = tmp_path / "killed", random.Random(0)
    for number in range(5):
        process = subprocess.Popen(
            [sys.executable, *module, str(killed)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        # Anywhere in its work: after so many more images as a fifth of them at most.
        there, target = len(list(killed.glob("*.png"))), chance.randint(1, 4)
        while len(list(killed.glob("*.png"))) < there + target and process.poll() is None:
            time.sleep(0.001)
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.wait()
        assert 0 < len(list(killed.glob("*.png"))) < 20, number
    succeed([sys.executable, *module, str(killed)], tmp_path)
    assert files_of(killed) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompts", "a", "--safety", "extreme"], "'extreme': unknown; allowed are weak, medium, strong, max"),
        (["--prompts", "a", "--safety_concept", "x"], "safety_concept needs --safety"),
        (["--prompts", "a", "--safety", "max", "--guidance_scale", "1"], "guidance_scale 1.0: with --safety"),
        (["--prompts", "a", "--dtype", "int8"], "dtype 'int8': unknown"),
        (["--prompts", "a", "--batch_size", "0"], "batch_size 0: must be at least 1"),
        (["--prompts", " "], "prompts, row 1: prompt ' ': must be a text that is not blank"),
        (["--prompts", "none.csv"], "none.csv: cannot be read"),
        (["--prompts", "a", "b.CSV"], "b.CSV: a file must be the only one"),
        (["--prompts", "{blank}"], "blank.csv: no row has text in the column 'prompt'"),
        (["--prompts", "{no_prompt}"], "no_prompt.csv: no column 'prompt', only text, seed"),
        (["--prompts", "{bad_seed}"], "bad_seed.csv, row 1: seed 'seven' is not a whole number"),
        (["--prompts", "{weak_row}", "--safety", "max"], "guidance_scale 1.0: with --safety max it must be above 1"),
        (["--prompts", "a", "--preset", "full"], "preset 'full': unknown; allowed are smoke, quick, paper"),
        (["--prompts", "a", "--layout", "excel"], "layout 'excel': unknown; allowed are i2p, "),
        (["--prompts", "a", "--categories", "hate"], "category 'hate': unknown; allowed are none"),
        (["--prompts", "a", "--max_prompts", "0"], "max_prompts 0: must be at least 1"),
        (["--prompts", "a", "--lora", "nowhere.safetensors"], "'nowhere.safetensors': no such file, folder or Hub"),
        (["--prompts", "a", "--lora_scale", "2"], "lora_scale 2.0: needs --lora"),
        (["--prompts", "a", "--editing_prompt", "x", "--safety", "max"], "steers in one of these ways only"),
        (
            ["--prompts", "a", "--editing_prompt", "x", "--num_inference_steps", "9"],
            "--editing_prompt changes nothing",
        ),
        (["--prompts", "a", "--edit_threshold", "0.5"], "edit_threshold 0.5: needs --editing_prompt"),
        (["--prompts", "a", "--negative_prompt", "x", "--guidance_scale", "1"], "with --negative_prompt it must be"),
        (["--prompts", "{endless}"], "cannot be read (field larger than field limit"),
        (["--prompts", "{unclosed}"], "cannot be read (unexpected end of data"),
        (
            ["--prompts", "a", "--safety", "weak", "--num_inference_steps", "15"],
            "--safety weak changes nothing",
        ),
        (["--prompts", "a", "--safety", "max", "--safety_concept", " "], "safety_concept ' ': is empty"),
        (["--prompts", "a", "--height", "-8", "--width", "8"], "height -8: must be at least 1"),
        (["--prompts", "a", "--height", "64"], "height 64, width None: give both or neither"),
        (["--prompts", "a", "--model", "nowhere"], "model 'nowhere': no folder or Hub repository"),
        (["--prompts", "a", "--model", "{strange}"], "its pipeline class 'DreamPipeline' is none of diffusers"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, options, message):
    files = {"no_prompt": "text,seed\na,1\n", "bad_seed": "prompt,seed\na,seven\n", "blank": "id,prompt\nx,\ny,NaN\n"}
    files["weak_row"] = "prompt,guidance_scale\na,5\nb,1\n"
    files["unclosed"] = 'prompt,seed\n"a cat,1\na dog,2\n'
    files["endless"] = f"prompt\n{'a' * 200_000}\n"
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "model_index.json").write_text('{"_class_name": "DreamPipeline"}')
    paths = {name: tmp_path / f"{name}.csv" for name in files} | {"strange": tmp_path / "strange"}
    options = [option.format(**paths) for option in options]
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--output_dir", str(tmp_path / "out"), *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
