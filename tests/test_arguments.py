"""Options from Python, from YAML files and from command lines: the same types, limits and messages."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, is_dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_safe.arguments import check_values, declared_options, typed
from diffusers_safe.cli import COMMANDS
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.distillation.options import DistillationOptions
from diffusers_safe.erasure.job import erasure_options
from diffusers_safe.families import denoiser_names
from diffusers_safe.methods import METHODS
from diffusers_safe.pipelines.guidance import SafetyConfig
from diffusers_safe.values import AT_MOST, check_value, choose
from diffusers_safe.yaml_files import read_yaml
from scripts import environment


@typed
@dataclass
class Options:
    concepts: list[str] = field(metadata={"help": "100 % of them."})
    steps: int = 3
    learning_rate: float = 1e-5
    scale: bool = False
    checker: bool = True
    kind: str = field(default="bk-small", metadata={"choices": ("bk-small", "sd_tiny")})
    metrics: list[str] = field(default_factory=list, metadata={"choices": ("q16", "clip_score")})
    rank: int | None = None
    output_dir: str = "out"
    hub_token: str | None = None


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        (int, "3", 3),
        (int, " 1e3 ", 1000),
        (int, 3.0, 3),
        (int, np.int64(3), 3),
        (int, np.float32(3), 3),
        (int, torch.tensor(3), 3),
        (int, str(2**64 - 1), 2**64 - 1),
        (float, "1e-5", 1e-5),
        (float, 2, 2),
        (float, np.float32(0.5), 0.5),
        (float, Decimal("0.5"), 0.5),
        (float | None, None, None),
        (bool, "no", False),
        (bool, "True", True),
        (bool, np.bool_(True), True),
        (bool, 1, True),
        (str, Path("a/b"), "a/b"),
        (str, np.str_("a"), "a"),
        (Path, "a", Path("a")),
        (list[str], "dog", ["dog"]),
        (list[str], Path("dogs.txt"), ["dogs.txt"]),
        (list[str], ("a", "b"), ["a", "b"]),
        (list[str], np.array(["a", "b"]), ["a", "b"]),
        (list[int], ["1", 2], [1, 2]),
        (tuple[str, ...], ["a"], ("a",)),
        (str | Path, Path("a"), Path("a")),
        (str | list[str], "a", "a"),
        (list[str] | None, None, None),
        (dict, {"a": 1}, {"a": 1}),
    ],
)  # fmt: skip
def test_what_can_only_mean_one_thing_is_converted(kind, value, expected):
    converted = check_value("x", value, kind)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    "kind, value, message",
    [
        (int, True, "x True: must be a whole number"),
        (int, np.bool_(True), "x True: must be a whole number"),
        (int, 1.5, "x 1.5: must be a whole number"),
        (int, "1.5", "x '1.5': must be a whole number"),
        (int, "", "x '': must be a whole number"),
        (int, None, "x None: must be a whole number"),
        (int, [1], "x (list): must be a whole number"),
        (int, "9" * 5000, "x '9999"),
        (int, float("nan"), "x nan: must be a finite number"),
        (float, float("inf"), "x inf: must be a finite number"),
        (float, "nan", "x 'nan': must be a finite number"),
        (float, 10**400, "x of more than 80 digits: must be a number"),
        (float, 1j, "x (complex): must be a number"),
        (float | None, "high", "x 'high': must be a number"),
        (float, False, "x False: must be a number"),
        (bool, "maybe", "x 'maybe': must be true or false"),
        (bool, 2, "x 2: must be true or false"),
        (bool, 0.0, "x 0.0: must be true or false"),
        (str, 3, "x 3: must be text"),
        (str, None, "x None: must be text"),
        (str, b"a", "x (bytes): must be text"),
        (str, ["a"], "x (list): must be text"),
        (str, "a\udcff", "x 'a\\udcff': is not valid Unicode text"),
        (str, "a\0", "x 'a\\x00': must not hold a null character"),
        (list[str], {"a": 1}, "x (dict): must be a list of texts"),
        (list[str], {"a"}, "x (set): must be a list of texts"),
        (list[str], None, "x None: must be a list of texts"),
        (list[str], ["a", 1], "x 1 (entry 2 of 2): must be text"),
        (list[str], ["a", ["b"]], "x (list) (entry 2 of 2): must be text"),
        (list[str], ["a", None], "x None (entry 2 of 2): must be text"),
        (str | list[str], 3, "x 3: must be text or a list of texts"),
        (SafetyConfig, {}, "x (dict): must be a SafetyConfig"),
        (dict, [], "x (list): must be a mapping"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(kind, value, message):
    with pytest.raises(ValueError) as error:
        check_value("x", value, kind)
    told = str(error.value)
    assert told.startswith(message) and len(told) < 200 and "\n" not in told


def test_a_secret_is_not_shown():
    with pytest.raises(ValueError, match="^hub_token: must be text$"):
        Options(["a"], hub_token=["hf_secret"])


@pytest.mark.parametrize("name", ["bk_small", "bk-small", "BK-Small", "sd-tiny"])
def test_underscores_and_dashes_are_alike_in_values(name):
    assert Options(["a"], kind=name).kind in ("bk-small", "sd_tiny")
    assert choose("kind", "esd_2025", ["paper", "esd-2025", None]) == "esd-2025"
    assert Options(["a"], metrics=["clip-score"]).metrics == ["clip_score"]


@pytest.mark.parametrize("name", AT_MOST)
def test_absurd_sizes_are_refused(name):
    assert check_value(name, AT_MOST[name], int) == AT_MOST[name]
    with pytest.raises(ValueError, match=f"^{name} {AT_MOST[name] + 1}: must be at most"):
        check_value(name, AT_MOST[name] + 1, int)


def test_functions_are_checked_like_dataclasses():
    @typed
    def run(folder: Path, names: list[str], scale: float = 1.0, *rest: int, **others: str):
        return folder, names, scale, rest, others

    assert run("a", "dog", scale="2", other=1) == (Path("a"), ["dog"], 2.0, (), {"other": 1})
    with pytest.raises(ValueError, match="^scale 'x': must be a number$"):
        run("a", ["dog"], "x")
    with pytest.raises(TypeError):
        run("a")


def parse(*argv, **more):
    return parse_dataclass(Options, argv=list(argv), prog="program", **more)


def fails(capsys, *argv, **more):
    with pytest.raises(SystemExit) as stop:
        parse(*argv, **more)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0].removeprefix("program: error: ")


def test_lists_that_are_given_twice_are_extended():
    assert parse("--concepts", "a", "b", "--steps", "5", "--concepts", "c").concepts == ["a", "b", "c"]
    assert parse("--concepts=a", "--concepts=b").concepts == ["a", "b"]


def test_values_of_a_command_line_have_the_types_of_the_fields():
    words = "--concepts a --steps 1e2 --learning-rate 1e-4 --scale --no-checker --rank 4 --kind bk_small"
    args = parse(*words.split())
    assert (args.steps, args.learning_rate, args.scale, args.checker, args.rank) == (100, 1e-4, True, False, 4)
    assert args.kind == "bk-small" and parse("--concepts", "a", "--scale", "false").scale is False
    assert parse("a", positional="concepts").concepts == ["a"]
    assert parse("--steps", "1", "a", positional="concepts").concepts == ["a"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stps", "3"], "unrecognized arguments: --stps (did you mean --steps?)"),
        (["--learning-rte=hf_secret"], "unrecognized arguments: --learning-rte (did you mean --learning_rate?)"),
        (["-steps", "3"], "unrecognized arguments: -steps (did you mean --steps?)"),
        (["–steps", "3"], "unrecognized arguments: –steps (did you mean --steps?)"),
        (["--steps", "3"], "the following arguments are required: --concepts"),
        (["--concepts", "a", "--steps", "x"], "steps 'x': must be a whole number"),
        (["--concepts", "a", "--steps", "nan"], "steps 'nan': must be a finite number"),
        (["--concepts", "a", "--scale", "maybe"], "scale 'maybe': must be true or false"),
        (["--concepts", "a", "--kind", "x"], "kind 'x': unknown; allowed are bk-small, sd_tiny"),
        (["--concepts", "a", "--rank", "100000"], "rank 100000: must be at most 16,384"),
        (["--concepts", "\udcff"], "concepts '\\udcff': is not valid Unicode text"),
        (["--concepts", "a", "--config", "\udcff"], "cannot be read as YAML (No such file or directory)"),
        (["\udcff"], "unrecognized arguments: \\udcff"),
    ],
)  # fmt: skip
def test_bad_command_lines(capsys, argv, message):
    error = fails(capsys, *argv)
    assert message in error.encode("utf-8", "backslashreplace").decode() and "hf_secret" not in error


@pytest.mark.parametrize(
    "error", [OSError("[Errno 36] File name too long"), RecursionError("too deep"), ValueError("no")]
)
def test_what_a_check_finds_is_one_line(capsys, error):
    def check(args):
        raise error

    assert fails(capsys, "--concepts", "a", check=check) == str(error)


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file and returns the words that name it."""

    def write(text):
        (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(tmp_path / "run.yaml")]

    return write


def test_values_of_a_config_file_are_set_not_parsed(config):
    args = parse(*config('concepts: [knife, "--steps=77", -1, "--scale", no, 1984, 1e3, "null", ""]\n'))
    assert args.concepts == ["knife", "--steps=77", "-1", "--scale", "no", "1984", "1e3", "null", ""]
    assert args.steps == 3 and args.scale is False
    args = parse(*config("concepts: --steps\nlearning-rate: 1e-5\nsteps: 1000\nscale: yes\noutput_dir: '--x y'\n"))
    assert (args.concepts, args.learning_rate, args.steps) == (["--steps"], 1e-5, 1000)
    assert (args.scale, args.output_dir) == (True, "--x y")


def test_the_command_line_replaces_what_the_config_file_says(config):
    words = config("concepts: [a, b]\nsteps: 5\nmetrics: []\nrank:\nhub_token: ~\n")
    args = parse(*words)
    assert (args.concepts, args.steps, args.metrics, args.rank) == (["a", "b"], 5, [], None)
    args = parse(*words, "--concepts", "c", "--concepts", "d", "--steps", "6")
    assert (args.concepts, args.steps) == (["c", "d"], 6)


BOMB = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n"
                                  for p, c in zip("abcdefgh", "bcdefghi")) + "concepts: *i\n"  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("concepts: a\nconcepts: b\n", "cannot be read as YAML ('concepts' twice in line 2)"),
        ("learning_rate: 1\nlearning-rate: 2\n", "'learning_rate' twice in line 2"),
        ("concepts: [a]\nstps: 3\n", "unrecognized arguments: --stps (did you mean --steps?)"),
        ("concepts: [a]\nhub_tokn: hf_secret\n", "unrecognized arguments: --hub_tokn (did you mean --hub_token?)"),
        ("concepts: {a: b}\n", "concepts (dict): must be a list of texts"),
        ("concepts: [[a]]\n", "concepts (list): must be text"),
        ("concepts: [a, ~]\n", "concepts None (entry 2 of 2): must be text"),
        ("concepts: [a]\nsteps: [1]\n", "steps (list): must be a whole number"),
        ("concepts: [a]\nsteps: true\n", "steps 'true': must be a whole number"),
        ("concepts: [a]\nlearning_rate: .nan\n", "learning_rate '.nan': must be a number"),
        ("concepts: [a]\nlearning_rate: inf\n", "learning_rate 'inf': must be a finite number"),
        ("concepts: [a]\nrank: 100000\n", "rank 100000: must be at most 16,384"),
        ("concepts: [a]\nhub_token: [hf_secret]\n", "hub_token: must be text"),
        ("concepts: [a]\nconfig: other.yaml\n", "names another config"),
        ('concepts: ["\\ud800"]\n', "is not valid Unicode text"),
        ('concepts: ["\\0"]\n', "must not hold a null character"),
        ("concepts: " + "[" * 20000, "cannot be read as YAML (it is nested too deeply)"),
        ('{"concepts": ' * 5000 + "1", "cannot be read as YAML (it is nested too deeply)"),
        (BOMB, "unrecognized arguments"),
        ("concepts: &a [x, *a]\n", "cannot be read as YAML"),
        ("concepts:\n- &a x\n" + "- *a\n" * 250_000, "cannot be read as YAML (more than 100 aliases in line 103)"),
        ("concepts: " + BOMB.splitlines()[0][3:] + "\n? [a]\n: b\n", "cannot be read as YAML"),
        ("- a\n", "must hold a mapping"),
        ("just text", "must hold a mapping"),
        ("concepts: [a]\n---\nconcepts: [b]\n", "cannot be read as YAML"),
        (b"\xff\xfe", "cannot be read as YAML (it is not UTF-8 text)"),
        (b"x" * (2**24 + 1), "is larger than 16 MiB"),
        ("", "the following arguments are required: --concepts"),
    ],
)  # fmt: skip
def test_bad_config_files(capsys, config, text, message):
    error = fails(capsys, *config(text))
    assert message in error and "hf_secret" not in error and len(error) < 1000


def test_lists_have_a_limit():
    with pytest.raises(ValueError, match="concepts of 1,000,001 entries: must have at most 1,000,000 entries"):
        check_value("concepts", ["a"] * (10**6 + 1), list[str])


def test_yaml_knows_text_and_null(config):
    path = config("a: no\nb: null\nc: 'null'\nd:\ne: ''\nf: 1e-5\n")[1]
    assert read_yaml(path, "file") == {"a": "no", "b": None, "c": "null", "d": None, "e": "", "f": "1e-5"}


def test_help_says_how_lists_and_files_combine(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "100 % of them." in told and "(default: 1e-05)" in told
    assert "list option that is given several times on the command line is extended" in told
    assert "--no_checker Same as --checker false." in told


def test_help_shows_list_defaults_as_they_are_typed(capsys):
    @dataclass
    class Lists:
        prompts: list[str] = field(default_factory=lambda: ["a cat", "a dog's house", "tree"])
        sizes: list[int] = field(default_factory=lambda: [1, 2])
        caption: str = "a photo of {}"

    with pytest.raises(SystemExit):
        parse_dataclass(Lists, argv=["--help"])
    told = " ".join(capsys.readouterr().out.split())
    shown = [f"(default: {text})" for text in (shlex.join(Lists().prompts), "1 2", "'a photo of {}'")]
    assert shlex.split(shown[0][10:-1]) == Lists().prompts and all(text in told for text in shown)


JOBS = {**{name: erasure_options(method) for name, method in METHODS.items()}, "distillation": DistillationOptions}
SAVES = ("full", "partial", "both", "lora", *denoiser_names())


@pytest.mark.parametrize("name", JOBS)
def test_the_help_of_save_offers_what_the_job_accepts(name):
    given = {"pretrained_model_name_or_path": "a", "output_dir": "b", "concepts": ["c"], "anchor_prompt": "d",
             "student": "bk-small", "train_data_dir": "e"}  # fmt: skip
    options = declared_options(JOBS[name])
    given = {option: value for option, value in given.items() if option in options}
    plain, _, lora = options["save"].facts["help"].partition("With --rank: ")
    assert bool(lora) == ("rank" in options)
    for text, more in ((plain, {}), (lora, {"rank": 4}))[: 1 + bool(lora)]:
        for save in SAVES:
            try:
                JOBS[name].of(**given, **more, save=save)
            except ValueError as error:
                assert str(error).startswith(f"save '{save}': allowed")
                offered = False
            else:
                offered = True
            assert bool(re.search(rf"(^|: |, |or ){save} ", text)) == offered, (save, text)
        default = JOBS[name].of(**given, **more).output.save
        assert default in re.findall(r"\w+", (lora or plain).partition("Default:")[2])


@pytest.mark.slow
def test_programs_that_are_modules_are_named_as_they_are_started():
    words = [sys.executable, "-m", "diffusers_safe.training.distillation", "--stps", "3"]
    told = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240).stderr
    assert told.startswith("python -m diffusers_safe.training.distillation: error: unrecognized arguments: --stps")


def test_every_dataclass_of_options_is_typed():
    """A value of a wrong type is refused by each of them, whichever field it is given for."""
    modules = {__import__(module, fromlist=["x"]) for module, _ in COMMANDS.values()}
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if is_dataclass(kind) and kind.__name__.endswith(("Arguments", "Options"))]
    assert len(kinds) >= 9
    for kind in (*kinds, *map(erasure_options, METHODS.values()), DistillationOptions):
        for name in declared_options(kind):
            with pytest.raises(ValueError, match=rf"^{name} ?(\(object\))?: must be "):
                check_values(kind, {name: object()})


def run_until_closed(*words):
    """The exit code and stderr of a command whose output nobody reads, as after `| head -1`."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_safe.cli", *words], stdout=writing, stderr=subprocess.PIPE, env=environment()
    )
    os.close(writing)
    os.close(reading)
    return process.wait(timeout=240), process.stderr.read().decode()


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_program_quietly(tmp_path):
    code, error = run_until_closed("prompts", "--prompts", "a", "b")
    assert (code, error) == (141, "")


@pytest.mark.parametrize("value", ['!!python/object/apply:os.system ["x"]', "!!float 1e0", "!mine x"])
def test_tags_of_yaml_are_refused(tmp_path, value):
    (tmp_path / "config.yaml").write_text(f"concepts: {value}\n")
    with pytest.raises(ValueError, match="the tag .*line 1"):
        read_yaml(tmp_path / "config.yaml", "config")
