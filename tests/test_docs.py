"""README and docs: links lead somewhere, commands have the options that they are given, the README stays short."""

import json
import re
import shlex

import pytest

from diffusers_safe import cli
from diffusers_safe.distillation import run as distillation
from diffusers_safe.methods import DEFAULT_METHOD
from diffusers_safe.methods import method as registry
from diffusers_safe.training import esd, sdd
from scripts import ROOT


DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SCRIPTS = {"train_sdd.py": sdd.main, "train_esd.py": esd.main, "train_distill.py": distillation.main}


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in index


def test_the_readme_is_short_and_starts_with_a_picture_of_a_result():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    assert "](docs/images/" in text.split("\n## ")[0]


def commands():
    """The commands of our own programs in all code blocks, as lists of words."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "diffusers-safe" in words[:1] or any(word in SCRIPTS for word in words):
                    yield words


def help_of(words, capsys):
    with pytest.raises(SystemExit) as stop:
        if words[0] == "diffusers-safe":
            method = words[words.index("--method") + 1] if "--method" in words else DEFAULT_METHOD
            cli.main([words[1], *(["--method", method] if words[1] == "erase" else []), "--help"])
        else:
            next(main for script, main in SCRIPTS.items() if script in words)(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_commands_have_the_options_that_they_are_given(capsys):
    found = list(commands())
    assert len(found) > 20
    helps = {}
    for words in found:
        name = words[1] if words[0] == "diffusers-safe" else next(word for word in words if word in SCRIPTS)
        start = words.index(name)
        if name == "erase":
            name = f"erase {words[words.index('--method') + 1] if '--method' in words else DEFAULT_METHOD}"
        if name not in helps:
            helps[name] = help_of(words, capsys)
        for option in [word for word in words[start:] if word.startswith("--") and word != "--method"]:
            assert re.search(rf"^  {option}\b", helps[name], re.M), (words, option)


def test_benchmarks_have_the_options_that_they_are_given():
    found = {
        command for page in PAGES for command in re.findall(r"python (benchmarks/\w+\.py[^`]*)", page.read_text())
    }
    assert len(found) > 5
    for command in found:
        script, *words = shlex.split(command)
        fields = set(re.findall(r"^    (\w+): ", (ROOT / script).read_text(), re.M))
        assert {word[2:] for word in words if word.startswith("--")} <= fields, command


def test_the_method_of_the_docs_runs(on_cpu, tiny_model_folder, tmp_path, monkeypatch):
    section = (ROOT / "docs" / "methods.md").read_text().split("## Your own method")[1]
    code = section.split("```python\n")[1].split("```")[0]
    assert code.count('"emoji"') == code.count('"runs/shrunk"') == 1
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    code = code.replace('"emoji"', repr(tiny_model_folder)).replace('"runs/shrunk"', repr(str(tmp_path / "out")))
    names = {"__name__": "docs"}
    exec(code, names)
    record = json.loads((tmp_path / "out" / "erasure.json").read_text())
    assert (record["method"], record["train_method"]) == ("shrink", "xattn-strict") and names["erasure"].weights
