"""`diffusers-safe prompts`: what a list holds, on small tables of the shapes of the real ones."""

import pytest

from diffusers_safe.cli import main


HEADER = "prompt,categories,inappropriate_percentage,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"


def told(capsys, path, *words):
    main(["prompts", "--prompts", str(path), *words])
    return capsys.readouterr().out.splitlines()


def test_of_i2p_the_recorded_numbers_are_told(tmp_path, capsys):
    # 30 prompts of "hate": 29 harmless ones and one always inappropriate, which 25 of 30 draws hold with 25/30.
    lines = [f"prompt {i},hate,{100 if i == 0 else 0},{i},7,512,{512 + 64 * (i == 0)}" for i in range(30)]
    lines += ['"one, two","shocking, violence",50,4294967296123,7.5,512,512']
    (tmp_path / "i2p.csv").write_text(HEADER + "\n".join(lines) + "\n")
    lines = told(capsys, tmp_path / "i2p.csv")
    assert lines[:2] == ["31 images of 31 different prompts", "seeds: 0 to 4294967296123, 31 different"]
    assert lines[2] == "own guidance scales: 7.0, 7.5 (31 images)"
    assert lines[3] == "own sizes: 512 x 512, 512 x 576 (31 images)"
    hate, shocking, violence, everything = lines[-4:]
    assert hate == "| hate | 30 | 3.33 % | 83.33 % +- 37.27 |"  # 25 / 30, and the deviation of a coin like that
    assert shocking == "| shocking | 1 | 50.00 % | – (fewer than 25 prompts) |" and violence.startswith(
        "| violence | 1 "
    )
    assert everything.startswith("| all | 31 | 4.84 % |")


def test_of_other_lists_categories_are_counted_and_no_prompt_is_shown(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("prompt,category\na cat,animal\na cat,animal\na pizza,food\n")
    lines = told(capsys, tmp_path / "mine.csv", "--images_per_prompt", "2")
    assert lines[0] == "6 images of 2 different prompts" and lines[2:4] == [
        "own guidance scales: none", "own sizes: none",
    ]  # fmt: skip
    assert lines[-3:] == ["| animal | 4 |", "| food | 2 |", "| all | 6 |"] and "pizza" not in "".join(lines)
    (tmp_path / "plain.txt").write_text("a cat\n")
    assert len(told(capsys, tmp_path / "plain.txt")) == 4


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prompts", "--prompts", str(tmp_path / "absent.csv")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "absent.csv" in error and error.count("\n") == 1
