"""Lists of concepts, concepts in prompts, and the order in which concepts are trained."""

import pytest
import torch

from diffusers_safe.concepts import CONCEPT_SCHEDULES, PROMPT_ORDERS, ConceptSchedule, names_concept, read_concepts


def test_read_concepts_from_names_and_files(tmp_path):
    assert read_concepts(["Van Gogh", " knife ", "knife"]) == ["Van Gogh", "knife"]
    listing = tmp_path / "concepts.txt"
    listing.write_text("# styles\nVan Gogh\n\nÉdouard Manet\n", encoding="utf-8")
    assert read_concepts([str(listing)]) == ["Van Gogh", "Édouard Manet"]


@pytest.mark.parametrize("values", [[], [""], ["knife", " "]])
def test_read_concepts_refuses_nothing(values):
    with pytest.raises(ValueError, match="at least one concept"):
        read_concepts(values)


def test_read_concepts_refuses_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_concepts([str(tmp_path / "none.txt")])
    (tmp_path / "empty.txt").write_text("# only a comment\n")
    with pytest.raises(ValueError, match="contains no concept"):
        read_concepts([str(tmp_path / "empty.txt")])


def test_entries_and_files_are_joined(tmp_path):
    for name, text in (("a.txt", "knife\n"), ("b.txt", "gun\nbomb\n")):
        (tmp_path / name).write_text(text)
    listed = [str(tmp_path / "a.txt"), "sword", str(tmp_path / "b.txt")]
    assert read_concepts(listed) == ["knife", "sword", "gun", "bomb"]
    with pytest.raises(ValueError, match="^retain_prompts .*: give at least one prompt"):
        read_concepts([" "], "retain_prompts")


def test_duplicates_are_used_once_and_reported(caplog):
    assert read_concepts(["Van Gogh", "knife", "van  gogh", "VAN GOGH"]) == ["Van Gogh", "knife"]
    assert caplog.messages == ["concepts: duplicates are used once: 'Van Gogh' (3 times)"]
    caplog.clear()
    read_concepts([letter * 100 for letter in "abcdefg"] * 2)
    (message,) = caplog.messages
    assert message.endswith("'" + "e" * 80 + "' (2 times) and 2 more")


SEVERAL = ["violence, nudity", "violence,nudity", "violence; nudity", "violence and nudity", "violence/nudity",
           "violence|nudity", "violence、nudity"]  # fmt: skip


@pytest.mark.parametrize("entry", SEVERAL)
def test_an_entry_is_a_single_concept_and_a_note_shows_how_to_give_several(caplog, entry):
    assert read_concepts([entry]) == [entry]
    (message,) = caplog.messages
    assert message == f'concepts: "{entry}" is a single concept; for 2 concepts use --concepts "violence" "nudity"'


def test_prompts_have_commas(caplog):
    assert read_concepts(["a cat, sitting"], "validation_prompts") == ["a cat, sitting"] and not caplog.messages


@pytest.mark.parametrize(
    "prompt, concept",
    [
        ("a Gun, on the table", "gun"),
        ("art by Van Gogh", "van gogh"),
        ("Van_Gogh's sunflowers", "Van  Gogh"),
        ("van-gogh", "Van Gogh"),
        ("two bananas", "banana"),
        ("a banana", "bananas"),
        ("Knives!", "knife"),
        ("a glove", "gloves"),
        ("boxes", "box"),
        ("cities", "city"),
        ("policemen", "policeman"),
        ("C++ code", "C++"),
        ("a 🔫 here", "🔫"),
        ("ＫＮＩＦＥ", "knife"),
    ],
)
def test_a_prompt_names_a_concept(prompt, concept):
    assert names_concept(prompt, concept)


@pytest.mark.parametrize(
    "prompt, concept",
    [
        ("it has begun", "gun"),
        ("", "gun"),
        ("a bandana", "banana"),
        ("a catalog", "cat"),
        ("vitamin c", "C++"),
        ("Van Damme", "Van Gogh"),
        ("a glass", "gla"),
        ("a bus", "bu"),
    ],
)
def test_a_prompt_does_not_name_a_concept(prompt, concept):
    assert not names_concept(prompt, concept)


def prompts_of(schedule, count=6):
    return [schedule.prompts(i, torch.Generator().manual_seed(i)) for i in range(count)]


def test_iterative_takes_turns_in_both_orders():
    concepts = ["knife", "gun", "bomb"]
    paper = prompts_of(ConceptSchedule(concepts))
    assert [sampled for sampled, _ in paper] == concepts * 2
    assert {trained for _, trained in paper} == {"knife, gun, bomb"}
    repository = prompts_of(ConceptSchedule(concepts, prompt_order="repository"))
    assert repository == [(trained, sampled) for sampled, trained in paper]
    matched = prompts_of(ConceptSchedule(concepts, prompt_order="matched"))
    assert matched == [(concept, concept) for concept in concepts * 2]


def test_sequential_gives_each_concept_an_equal_share():
    """The reference implementation only trains the first concept."""
    schedule = ConceptSchedule(["knife", "gun", "bomb"], "sequential", num_samples=6)
    assert prompts_of(schedule, 7) == [(c, c) for c in ("knife", "knife", "gun", "gun", "bomb", "bomb", "bomb")]


def test_random_depends_on_the_generator():
    schedule = ConceptSchedule(["knife", "gun", "bomb"], "random")
    first, second = prompts_of(schedule, 40), prompts_of(schedule, 40)
    assert first == second
    assert {sampled for sampled, _ in first} == {"knife", "gun", "bomb"}


def test_composite_joins():
    assert set(prompts_of(ConceptSchedule(["knife", "gun"], "composite"))) == {("knife, gun", "knife, gun")}


@pytest.mark.parametrize("schedule", CONCEPT_SCHEDULES)
@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_one_concept_is_the_same_in_every_schedule(schedule, order):
    assert set(prompts_of(ConceptSchedule(["knife"], schedule, order, num_samples=6))) == {("knife", "knife")}


@pytest.mark.parametrize("schedule", CONCEPT_SCHEDULES)
@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_all_prompts_knows_every_prompt(schedule, order):
    schedule = ConceptSchedule(["knife", "gun", "bomb"], schedule, order, num_samples=30)
    used = {prompt for pair in prompts_of(schedule, 30) for prompt in pair}
    assert used <= set(schedule.all_prompts())


def test_unknown_values_are_refused():
    with pytest.raises(ValueError, match="concept_schedule 'turns'.*iterative, random"):
        ConceptSchedule(["knife"], "turns")
    with pytest.raises(ValueError, match="prompt_order 'both'.*paper, repository"):
        ConceptSchedule(["knife"], prompt_order="both")
    with pytest.raises(ValueError, match="at least one"):
        ConceptSchedule([])


@pytest.mark.parametrize("entry", ["a\nb", '["violence", "nudity"]'])
def test_a_list_in_a_single_text_is_refused(entry):
    with pytest.raises(ValueError, match="is a list in a single text"):
        read_concepts([entry])


@pytest.mark.parametrize("value", ["x.csv", "concepts.json", "list.YAML"])
def test_files_of_other_kinds_are_refused(value):
    with pytest.raises(ValueError, match=f"concepts {value}: this kind of file is not supported; use a .txt file"):
        read_concepts([value])


def test_invisible_characters_are_blank(tmp_path):
    with pytest.raises(ValueError, match="no blank one"):
        read_concepts(["\u200b"])
    (tmp_path / "a.TXT").write_text("knife\n")
    assert read_concepts([str(tmp_path / "a.TXT")]) == ["knife"]


def test_a_null_character_in_a_file_is_refused(tmp_path):
    (tmp_path / "concepts.txt").write_bytes(b"knife\na\0b\n")
    with pytest.raises(ValueError, match=r"concepts 'a\\x00b': must not hold a null character"):
        read_concepts([str(tmp_path / "concepts.txt")])
