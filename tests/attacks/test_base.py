import json

import pytest

from diffusers_safe.attacks import ConceptInversion, InversionSettings, Paraphrases, SeedSearch, read_paraphrases
from diffusers_safe.generation.rows import PromptRow


ROWS = [PromptRow("k", "a knife", 5, {"subject": "knife"}), PromptRow("c", "a cat", 5)]


def test_seeds_follow_the_prompts_own():
    tries = SeedSearch(4).tries(PromptRow("k", "a knife", 2**64 - 2, {"subject": "knife"}))
    assert [row.seed for row in tries] == [2**64 - 1, 0, 1]
    assert {row.prompt for row in tries} == {"a knife"} and {row.labels["subject"] for row in tries} == {"knife"}
    assert len({row.id for row in tries} | {"k"}) == 4
    with pytest.raises(ValueError, match="num_seeds 1: must be at least 2"):
        SeedSearch(1)


def test_paraphrases_keep_the_seed_and_the_labels():
    attack = Paraphrases({"a knife": ["ein Messer", "un couteau"], "a cat": ["eine Katze"], "a dog": ["ein Hund"]})
    attack.check(ROWS)
    tries = attack.tries(ROWS[0])
    assert [row.prompt for row in tries] == ["ein Messer", "un couteau"]
    assert {row.seed for row in tries} == {5} and tries[0].labels == {"subject": "knife"}
    assert attack.facts == {"source": "given in Python", "paraphrases": 4, "of prompts not attacked": 1}
    with pytest.raises(ValueError, match="has no paraphrase of the prompt 'a cat'"):
        Paraphrases({"a knife": ["ein Messer"]}, "x.csv").check(ROWS)


def test_paraphrases_are_read_from_csv_and_jsonl(tmp_path):
    rows = [
        ("a knife", "ein Messer"),
        ("a cat", 'a "cat", small'),
        ("a knife", "un couteau"),
        ("a knife", "un couteau"),
        ("a knife", "a knife"),
        ("a cat", "a cat\u2028and its lines"),
    ]
    expected = {"a knife": ["ein Messer", "un couteau"], "a cat": ['a "cat", small', "a cat\u2028and its lines"]}
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    quoted = ['{},"{}"'.format(a, b.replace('"', '""')) for a, b in rows]
    table.write_text("\ufeffprompt,paraphrase\n" + "\n".join(quoted), encoding="utf-8")
    lines.write_text("\n".join(_json_line(a, b) for a, b in rows) + "\n\n", encoding="utf-8")
    assert read_paraphrases(table) == read_paraphrases(lines) == expected


def _json_line(prompt, paraphrase):
    return json.dumps({"prompt": prompt, "paraphrase": f" {paraphrase} "}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", "must be a .csv or .jsonl file"),
        ("none.csv", None, "cannot be read"),
        ("a.csv", "prompt,other\na,b\n", "row 1 has no column 'paraphrase'"),
        ("a.csv", "prompt,paraphrase\na,b\na, \n", "row 2 has no text in the column 'paraphrase'"),
        ("a.csv", "prompt,paraphrase\na\n", "row 1 has no text in the column 'paraphrase'"),
        ("a.csv", "prompt,paraphrase\n", "has no rows"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.jsonl", "[1]\n", "row 1 has no column 'prompt'"),
        ("a.jsonl", '{"prompt": "a", "paraphrase": 1}\n', "row 1 has no text"),
    ],
)
def test_a_broken_file_of_paraphrases_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"paraphrases .*{name}: .*{message}") as error:
        read_paraphrases(tmp_path / name)
    assert "\n" not in str(error.value)


def test_inversion_replaces_whole_words_only():
    attack = ConceptInversion("Knife", InversionSettings(steps=1))
    rows = [*ROWS, PromptRow("p", "a penknife, knifes, the KNIFE-knife", 1)]
    attack.check(rows)
    assert [row.id for row in attack.targets(rows)] == ["k", "p"]
    assert [attack.tries(row)[0].prompt for row in attack.targets(rows)] == [
        "a <inverted>",
        "a penknife, knifes, the <inverted>-<inverted>",
    ]
    with pytest.raises(ValueError, match="concept 'gun': none of the 2 prompts has it, such as 'a knife'"):
        ConceptInversion("gun").check(ROWS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConceptInversion(" "), "concept: must not be blank"),
        (lambda: ConceptInversion("a", template="a photo"), "must have one {}"),
        (lambda: InversionSettings(steps=0), "inversion_steps 0: must be at least 1"),
        (lambda: InversionSettings(learning_rate=float("nan")), "learning_rate nan: must be a finite number"),
        (lambda: InversionSettings(learning_rate=1.5), "inversion_learning_rate 1.5: must be above 0 and at most 1"),
        (lambda: InversionSettings(loss_space="x"), "inversion_loss_space 'x': unknown; allowed are prediction"),
        (lambda: InversionSettings(initializer=" "), "inversion_initializer: must not be blank"),
        (lambda: InversionSettings(checkpointing_steps=-1), "inversion_checkpointing_steps -1: must be at least 0"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_folder_without_pictures_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png: cannot be read"):
        ConceptInversion("knife", pictures=tmp_path).check(ROWS)
    with pytest.raises(ValueError, match="nowhere: no folder of images"):
        ConceptInversion("knife", pictures=tmp_path / "nowhere").check(ROWS)


@pytest.mark.parametrize(
    ("seeds", "step"),
    [
        ([0], 1),
        ([0, 1, 2], 3),
        ([0, 3], 4),
        ([0, 4], 1),
        ([5, 5], 1),
        ([2**64 - 1, 2**64 - 2], 2),
        ([0, 900, 901], 902),
    ],
)
def test_no_seed_of_a_prompt_is_tried_twice(seeds, step):
    rows = [PromptRow(str(number), "a knife", seed) for number, seed in enumerate(seeds)]
    rows.append(PromptRow("other", "a gun", 0))
    attack = SeedSearch(4)
    attack.check(rows)
    tried = [one.seed for row in {row.seed: row for row in rows[:-1]}.values() for one in [row, *attack.tries(row)]]
    assert len(set(tried)) == len(tried) == 4 * len(set(seeds))
    assert attack.facts == ({"seeds": 4} if step == 1 else {"seeds": 4, "seeds_apart": step})
    assert attack.tries(rows[-1])[0].seed == step
