"""`diffusers-safe generate`: what is wrong is told before work, what is drawn is written down."""

import pytest

from diffusers_safe import cli
from diffusers_safe.commands.generate import read_rows
from diffusers_safe.evaluation.generate import load_images, read_manifest
from diffusers_safe.guidance import SafetyConfig


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


def test_a_table_gives_ids_and_seeds_and_survives_newlines(tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text('id,prompt,seed\nfirst,"a cat\non a mat",18446744073709551000\n,a dog,\n', encoding="utf-8")
    rows = read_rows([str(table)], 2, 5)
    assert [(row.id, row.prompt, row.seed) for row in rows] == [
        ("first-18446744073709551000", "a cat\non a mat", 18446744073709551000),
        ("first-18446744073709551001", "a cat\non a mat", 18446744073709551001),
        ("00001-a-dog-5", "a dog", 5),
        ("00001-a-dog-6", "a dog", 6),
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompts", "a", "--safety", "extreme"], "'extreme': unknown; allowed are weak, medium, strong, max"),
        (["--prompts", "a", "--safety_concept", "x"], "safety_concept needs --safety"),
        (["--prompts", "a", "--safety", "max", "--guidance_scale", "1"], "guidance_scale 1.0: with --safety"),
        (["--prompts", "a", "--dtype", "int8"], "dtype 'int8': unknown"),
        (["--prompts", "a", "--batch_size", "0"], "batch_size 0: must be at least 1"),
        (["--prompts", " "], "prompt 1: is blank"),
        (["--prompts", "none.csv"], "none.csv: cannot be read"),
        (["--prompts", "a", "b.CSV"], "b.CSV: a file must be the only one"),
        (["--prompts", "{twice}"], "occurs twice"),
        (["--prompts", "{no_prompt}"], "has no column 'prompt', only text, seed"),
        (["--prompts", "{bad_seed}"], "seed 'seven' is no whole number"),
        (["--prompts", "{endless}"], "cannot be read (field larger than field limit"),
        (["--prompts", "{unclosed}"], "cannot be read (unexpected end of data"),
        (
            ["--prompts", "a", "--safety", "weak", "--num_inference_steps", "15"],
            "--safety weak changes nothing",
        ),
        (["--prompts", "a", "--safety", "max", "--safety_concept", " "], "must be a text that is not blank"),
        (["--prompts", "a", "--height", "-8", "--width", "8"], "height -8: must be at least 1"),
        (["--prompts", "a", "--height", "64"], "height 64, width None: give both or neither"),
        (["--prompts", "a", "--model", "nowhere"], "model 'nowhere': no folder or Hub repository"),
        (["--prompts", "a", "--model", "{strange}"], "its pipeline class 'DreamPipeline' is none of diffusers"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, options, message):
    files = {"no_prompt": "text,seed\na,1\n", "bad_seed": "prompt,seed\na,seven\n", "twice": "id,prompt\nx,a\nx,b\n"}
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
