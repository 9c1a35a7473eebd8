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
        (["dmo"], "invalid choice: 'dmo' (did you mean demo?)"),
        ([], "COMMAND"),
        (["--verson"], "unrecognized arguments: --verson (did you mean --version?)"),
        (["prepare_data"], "the following arguments are required: --source, --output_dir"),
        (["students", "--student", "bk_smal"], "student 'bk_smal': unknown; allowed are bk-base, bk-small"),
        (["push"], "the following arguments are required: --folder"),
        (
            ["push", "/nowhere", "--hub_tokn", "secret"],
            "unrecognized arguments: --hub_tokn (did you mean --hub_token?)",
        ),
        (["generate", "--prompts", "a", "--images_per_prompt", "1e9"], "must be at most 1,000,000"),
        (["generate", "--prompts", *"abcdefghijk", "--images_per_prompt", "1e6"], "these are 11,000,000 images"),
        (["demo", "--group", "cats"], "group 'cats': unknown; allowed are weapon, animal"),
        (["demo", "--images_per_prompt", "0"], "images_per_prompt 0: must be at least 1"),
        (["demo", "--sed", "secret"], "unrecognized arguments: --sed (did you mean --seed?)"),
        (["generate", "--model", "", "--prompts", "a"], "is empty; give a folder, a Hub id or emoji"),
        (["demo", "--seed", "1_000"], "seed '1_000': must be a whole number"),
        (["generate", "--prompts", "a", "--guidance_scale", "7_5"], "guidance_scale '7_5': must be a number"),
        (["generate", "--prompts", "a", "--batch_size", "१२"], "batch_size '१२': must be a whole number"),
        (["demo", "two"], "unrecognized arguments: two"),
        (["demo", "--seed", "-1"], "seed -1: must be at least 0"),
        (["demo", "--output_dir", "/proc/nowhere"], "output_dir /proc/nowhere: cannot be written"),
    ],
)
def test_what_is_wrong_is_exit_with_error(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1 and "secret" not in error


def test_a_command_of_one_process_is_not_launched_as_several(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        main(["export", "somewhere", "--output_dir", "elsewhere"])
    assert stop.value.code == 2
    assert "export: error: 2 processes were launched (see WORLD_SIZE in the environment)" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--version"], ["demo", "--version"], ["prepare_data", "--version"]])
def test_version(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("diffusers-safe 0.")


def test_a_student_may_be_spelled_with_underscores(tmp_path, capsys):
    main(["students", "--teacher", "emoji", "--student", "bk_small", "--output_dir", str(tmp_path / "student")])
    assert "bk-small, 6,095,848 parameters" in capsys.readouterr().out


def test_help_shows_examples_as_they_are_written(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    told = capsys.readouterr().out
    assert "\n    - {name: theirs, images: path/to/a/folder/of/pngs}\n" in told and "(default: None)" not in told


@pytest.mark.parametrize("place", ["diffusers_safe.cli.importlib.import_module", "diffusers_safe.commands.demo.run"])
def test_ctrl_c_ends_in_one_line(capsys, monkeypatch, tmp_path, place):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"
