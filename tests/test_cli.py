import pytest

from diffusers_safe.cli import main


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["dmo"], "invalid choice: 'dmo'"),
        ([], "COMMAND"),
        (["demo", "--group", "cats"], "group 'cats': unknown; allowed are weapon, animal"),
        (["demo", "--images_per_prompt", "0"], "images_per_prompt 0: must be at least 1"),
        (["demo", "--sed", "secret"], "unrecognized arguments: --sed (did you mean --seed?)"),
        (["demo", "two"], "unrecognized arguments: two"),
        (["demo", "--seed", "-1"], "seed -1: must be at least 0"),
        (["demo", "--output_dir", "/proc/nowhere"], "output_dir /proc/nowhere: cannot be written"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error.strip().splitlines()[-1] and "secret" not in error


def test_help_shows_examples_as_they_are_written(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    told = capsys.readouterr().out
    assert "\n    - {name: theirs, images: path/to/a/folder/of/pngs}\n" in told and "(default: None)" not in told
