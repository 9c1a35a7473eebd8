import json
from pathlib import Path

import pytest

from diffusers_safe.cli import main
from diffusers_safe.commands import demo
from diffusers_safe.commands.demo import DemoArguments, erasure_command
from diffusers_safe.erasure.job import parse_options


def options(concept):
    words = erasure_command(concept, "out")
    return parse_options("text_edit", words[words.index("text_edit") + 1 :]).flat


def test_the_demo_erases_a_group_an_object_or_a_style():
    weapons, banana, sketch = map(options, ("weapon", "banana", "sketch"))
    assert weapons["concepts"] == ["knife", "gun", "bomb", "sword", "axe", "weapon"]
    assert (banana["concepts"], banana["phrasings"]) == (["banana"], "object")
    assert (sketch["concepts"], sketch["phrasings"]) == (["sketch"], "style")
    assert {values["pretrained_model_name_or_path"] for values in (weapons, banana, sketch)} == {"emoji"}


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

    def run(words, prog):
        commands.append(words)
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "erasure.json").write_text("{}")
        raise SystemExit(3)

    monkeypatch.setattr(demo.erase, "main", run)
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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_erases_weapons_and_keeps_the_rest(tmp_path, capsys):
    main(["demo", "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "weapon-0" / "evaluation" / "results.json").read_text())
    found = results["metrics"]["emoji_recognition"]
    before, after = (found["estimates"][side]["concept"] for side in ("before", "after"))
    assert before["value"] > 0.9 and after["value"] < 0.1
    assert found["differences"]["after"]["others"]["estimate"]["value"] > -0.05
    out = capsys.readouterr().out
    assert "weapon recognised" in out and (tmp_path / "weapon-0" / "evaluation" / "report.html").as_uri() in out
