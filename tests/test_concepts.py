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
    with pytest.raises(ValueError, match="holds no concept"):
        read_concepts([str(tmp_path / "empty.txt")])


def test_entries_and_files_are_joined(tmp_path):
    for name, text in (("a.txt", "knife\n"), ("b.txt", "gun\nbomb\n")):
        (tmp_path / name).write_text(text)
    listed = [str(tmp_path / "a.txt"), "sword", str(tmp_path / "b.txt")]
    assert read_concepts(listed) == ["knife", "sword", "gun", "bomb"]
    with pytest.raises(ValueError, match="^retain_prompts .*: give at least one prompt"):
        read_concepts([" "], "retain_prompts")


def test_what_is_given_twice_is_used_once_and_reported(caplog):
    assert read_concepts(["Van Gogh", "knife", "van  gogh", "VAN GOGH"]) == ["Van Gogh", "knife"]
    assert caplog.messages == ["concepts: given several times, used once: 'Van Gogh' (3 times)"]
    caplog.clear()
    read_concepts([letter * 100 for letter in "abcdefg"] * 2)
    (message,) = caplog.messages
    assert message.endswith("'" + "e" * 80 + "' (2 times) and 2 more")


@pytest.mark.parametrize("entry", ["violence, nudity", "violence,nudity", "violence; nudity"])
def test_a_comma_does_not_separate_concepts(caplog, entry):
    assert read_concepts([entry]) == [entry]
    (message,) = caplog.messages
    assert message == f'concepts: "{entry}" is one concept; for 2 of them write --concepts "violence" "nudity"'


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


def test_sequential_gives_each_concept_its_share():
    """The reference trains concept 1 only."""
    schedule = ConceptSchedule(["knife", "gun", "bomb"], "sequential", num_samples=6)
    assert prompts_of(schedule, 7) == [(c, c) for c in ("knife", "knife", "gun", "gun", "bomb", "bomb", "bomb")]


def test_random_draws_all_concepts_from_its_generator():
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
    drawn = {prompt for pair in prompts_of(schedule, 30) for prompt in pair}
    assert drawn <= set(schedule.all_prompts())


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="concept_schedule 'turns'.*iterative, random"):
        ConceptSchedule(["knife"], "turns")
    with pytest.raises(ValueError, match="prompt_order 'both'.*paper, repository"):
        ConceptSchedule(["knife"], prompt_order="both")
    with pytest.raises(ValueError, match="at least one"):
        ConceptSchedule([])


@pytest.mark.parametrize("entry", ["a\nb", '["violence", "nudity"]'])
def test_a_list_in_one_text_is_refused(entry):
    with pytest.raises(ValueError, match="is a list in one text"):
        read_concepts([entry])


@pytest.mark.parametrize("entry", ["violence and nudity", "violence/nudity", "violence|nudity", "violence、nudity"])
def test_what_looks_like_two_concepts_is_reported(entry, caplog):
    assert read_concepts([entry]) == [entry]
    assert 'write --concepts "violence" "nudity"' in caplog.text


@pytest.mark.parametrize("value", ["x.csv", "concepts.json", "list.YAML"])
def test_a_file_of_another_kind_is_no_concept(value):
    with pytest.raises(ValueError, match=f"concepts {value}: a file of a kind that is not read; write a .txt file"):
        read_concepts([value])


def test_what_cannot_be_seen_is_blank(tmp_path):
    with pytest.raises(ValueError, match="none that is blank"):
        read_concepts(["\u200b"])
    (tmp_path / "a.TXT").write_text("knife\n")
    assert read_concepts([str(tmp_path / "a.TXT")]) == ["knife"]
