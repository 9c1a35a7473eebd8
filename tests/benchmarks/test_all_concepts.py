"""The bench of all concepts: what it asks for, and the table."""

import sys
from pathlib import Path

import pytest

from diffusers_safe.emoji.scenes import GROUPS, OBJECTS, STYLES, group_members
from diffusers_safe.methods import METHODS


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import all_concepts  # noqa: E402
from all_concepts import CHOOSING, CONTESTANTS, AllConceptsArguments, asked_for, contestant_options, table, work  # noqa: E402


pytestmark = pytest.mark.usefixtures("on_cpu")


def arguments(**values):
    return AllConceptsArguments(**{"output_dir": "x", **values})


def test_every_concept_is_erased_alone_and_the_halves_are_disjoint():
    todo = work(arguments(methods=["text edit"]))
    assert [concepts for _, concepts in todo[:70]] == [[name] for name in (*OBJECTS, *GROUPS, *STYLES)]
    assert [len(concepts) for _, concepts in todo[70:]] == [5, 5, 10, 10, 30, 30]
    halves = [work(arguments(methods=["text edit"], half=half)) for half in ("choosing", "reporting")]
    assert [len(half) for half in halves] == [37, 39] and not any(pair in halves[0] for pair in halves[1])
    assert len(CHOOSING) == 34 and not CHOOSING & {*OBJECTS[1::2]}
    for _, concepts in todo[70:]:
        assert CHOOSING.issuperset(concepts) or not CHOOSING & set(concepts)


@pytest.mark.parametrize("concepts", [["knife"], ["weapon"], ["sketch"], OBJECTS[:5]])
def test_what_is_asked_for(concepts):
    erased, others = asked_for(concepts, arguments())
    assert len(erased) == (20 if len(concepts) == 5 else 24)
    assert {one.label for one in erased} == set(concepts)
    assert all(concept in " ".join(one.prompt for one in erased) for concept in concepts)
    touched = {*concepts, *(group_members("weapon") if concepts == ["weapon"] else [])}
    assert [one.label for one in others] == [name for name in OBJECTS if name not in touched]
    assert not any("sketch" in one.prompt for one in others) or concepts != ["sketch"]
    assert len({one.prompt for one in others}) == len({one.seed for one in others}) == len(others)
    # The images of other objects are the same whatever is erased, so that the base model generates them once.
    assert concepts == ["sketch"] or {*others} <= {
        *asked_for(["cookie"], arguments())[1],
        *asked_for(["egg"], arguments())[1],
    }


def test_the_table_has_the_halves_apart_and_names_the_worst_concept():
    def row(concepts, left, others=59, method="UCE"):
        shares = {"left": left, "others": others, "others_before": 59}
        counts = {name: {"judge": value, "second_judge": value + 1} for name, value in shares.items()}
        counts |= {"erased_images": 24, "other_images": 60}
        return {"method": method, "concepts": concepts, **counts, "seconds": 0.5}

    text = table(
        [row(["knife"], 0), row(["bomb"], 6), row(["gun"], 12), row(OBJECTS[:5], 3), row(["dog"], 1, 30, "X")]
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    # knife and bomb have even places, gun an odd one; the first five have both.
    assert [line[:3] for line in lines] == [
        ["UCE", "5 at once, reporting", "1"], ["UCE", "objects, choosing", "2"], ["UCE", "objects, reporting", "1"],
        ["X", "objects, choosing", "1"],
    ]  # fmt: skip
    assert lines[1][3].startswith("12.5 [") and lines[1][4] == "25 bomb / 29 bomb" and lines[2][3] == "50.0 / 54.2"
    assert lines[3][5] == "50.8 / 51.7"


@pytest.mark.slow
def test_a_stopped_bench_continues_and_does_not_repeat(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(all_concepts, "QUICK", ("gun", "dog"))
    words = ["--output_dir", str(tmp_path), "--quick", "true", "--methods", "UCE, 2025"]
    words += ["--erased_images", "1", "--num_inference_steps", "1"]
    monkeypatch.setattr("sys.argv", ["all_concepts.py", *words])
    measure, calls = all_concepts.measure, []

    def stopping(label, concepts, args):
        calls.append((label, *concepts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(label, concepts, args)

    monkeypatch.setattr(all_concepts, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        all_concepts.main()
    all_concepts.main()
    assert calls == [("UCE, 2025", "gun"), *[("UCE, 2025", "dog")] * 2]
    assert "| UCE, 2025 | objects, reporting |" in (tmp_path / "table.md").read_text() == capsys.readouterr().out[:-1]
    monkeypatch.setattr("sys.argv", ["all_concepts.py", *words, "--other_images", "2"])
    with pytest.raises(SystemExit, match="holds rows of other settings; give another folder"):
        all_concepts.main()


def test_contestants_are_methods():
    assert all(contestant.method in METHODS for contestant in CONTESTANTS.values()) and len(STYLES) == 3


@pytest.mark.parametrize("concept", ["gun", "plant", "mosaic"])
def test_methods_that_train_retain_objects_that_are_not_counted(concept):
    retained = contestant_options(CONTESTANTS["SDD"], [concept])["retain_prompts"]
    counted = {one.label for one in asked_for([concept], arguments(others_step=2))[1]}
    assert len(retained) > 20 and not {prompt.split()[1] for prompt in retained} & counted
    assert not any(concept in prompt or "tulip" in prompt for prompt in retained) or concept != "plant"
    assert "retain_prompts" not in contestant_options(CONTESTANTS["UCE, 2025"], [concept])
    phrasings = contestant_options(CONTESTANTS["text edit"], [concept]).get("phrasings")
    assert phrasings == ("style" if concept in STYLES else None)
