import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from diffusers_safe.cli import main
from diffusers_safe.emoji import demo
from diffusers_safe.emoji.demo import DemoArguments, erasure_command
from diffusers_safe.emoji.scenes import OBJECTS
from diffusers_safe.erasure.job import parse_options


def test_the_demo_runs_the_public_script_with_arguments_it_takes(tiny_model_folder, tmp_path):
    """The same command works with the name of another model."""
    command = erasure_command(tiny_model_folder, "weapon", tmp_path / "out", seed=3)
    module = command.index("diffusers_safe.training.sdd")
    options = parse_options("sdd", command[module + 1 :]).flat
    assert options["concepts"] == ["knife", "gun", "bomb", "sword", "axe", "weapon"]
    assert "weapon" not in options["retain_prompts"] and "animal" in options["retain_prompts"]
    assert options["seed"] == 3


def test_the_demo_erases_any_object_or_style(tiny_model_folder, tmp_path):
    def options(concept):
        command = erasure_command(tiny_model_folder, concept, tmp_path / "out", seed=0)
        return parse_options("sdd", command[command.index("diffusers_safe.training.sdd") + 1 :]).flat

    banana, sketch = options("banana"), options("sketch")
    assert (banana["concepts"], banana["target_prompt"]) == (["banana"], "animal")
    assert "fruit" in banana["retain_prompts"] and "apple" in banana["retain_prompts"]
    assert (sketch["concepts"], sketch["target_prompt"]) == (["sketch style"], "")
    assert {"mosaic style", "animal", "cat"} < set(sketch["retain_prompts"])
    for concept in OBJECTS:
        assert concept not in demo.retained_prompts(concept)


def test_the_deprecated_name_of_the_concept_works():
    assert DemoArguments().folder == DemoArguments(group="weapon").folder == Path("runs/demo/weapon-0")
    assert DemoArguments(concept="banana").folder == Path("runs/demo/banana-0")
    with pytest.raises(
        ValueError, match="group fruit: is a deprecated name of concept, which is banana; give only one"
    ):
        DemoArguments(concept="banana", group="fruit")
    with pytest.raises(ValueError, match="concept 'zebra': unknown; allowed are weapon"):
        DemoArguments(concept="zebra")


def test_the_demo_replaces_its_own_files_and_no_other(tmp_path, monkeypatch, capsys):
    folder, commands = tmp_path / "weapon-0", []

    def run(command):
        commands.append(command)
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "erasure.json").write_text("{}")
        return 3

    monkeypatch.setattr(demo, "_run", run)
    for overwrites in (False, True):  # the second time it is its own
        with pytest.raises(SystemExit, match="3"):
            main(["demo", "--output_dir", str(tmp_path)])
        assert ("--overwrite" in commands[-1]) == overwrites
    (folder / ".written.json").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--output_dir", str(tmp_path)])
    assert "holds results of another run (model)" in capsys.readouterr().err and len(commands) == 2
    with pytest.raises(SystemExit, match="3"):
        main(["demo", "--output_dir", str(tmp_path), "--overwrite"])
    assert "--overwrite" in commands[-1] and (folder / "notes.txt").read_text() == "mine"


def test_the_training_is_stopped_with_the_demo():
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); time.sleep(60)"
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert demo._run([sys.executable, "-c", code]) in (7, 128 + signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_training_does_not_outlive_a_ctrl_c(tmp_path):
    """Of the demo alone: in a terminal, both get it."""
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        demo._run([sys.executable, "-c", code])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_erases_weapons_and_keeps_the_rest(tmp_path, capsys):
    main(["demo", "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "weapon-0" / "evaluation" / "results.json").read_text())
    found = results["metrics"]["emoji_recognition"]
    before, after = (found["estimates"][side]["concept"] for side in ("before", "after"))
    assert before["value"] > 0.9 and after["value"] < 0.1  # 0 of 24 here, 1 of 24 on another CPU, 2 with another seed
    assert found["differences"]["after"]["others"]["estimate"]["value"] > -0.05
    out = capsys.readouterr().out
    assert "weapon recognised" in out and (tmp_path / "weapon-0" / "evaluation" / "report.html").as_uri() in out
