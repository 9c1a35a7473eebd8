"""The words that methods keep, and the kinds among them."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_safe import erase
from diffusers_safe.families import make_family
from diffusers_safe.methods import text_edit
from diffusers_safe.methods.closed_form import vocabulary_words
from diffusers_safe.methods.text_edit import TextEdit, smallest_edit
from diffusers_safe.methods.vocabulary import KINDS, NO_ANCHORS, OBJECTS, words_of_kind


pytestmark = pytest.mark.usefixtures("on_cpu")


def test_every_word_is_there_once():
    assert len(OBJECTS) == len(set(OBJECTS)) and {*KINDS} < {*OBJECTS} and NO_ANCHORS < {*OBJECTS}


@pytest.mark.parametrize("concept", ["weapon", "Weapons", "a weapon", " the weapon"])
def test_a_kind_is_known_in_any_form(concept):
    assert words_of_kind(concept) == KINDS["weapon"]


@pytest.mark.parametrize("concept", ["knife", "wild animal", "animal painting", "violence", ""])
def test_other_concepts_are_no_kind(concept):
    assert words_of_kind(concept) == []


class Family:
    """Knows every word; those of a list are near the concept in turn."""

    def known_words(self, words):
        return list(words)

    whole_words = known_words

    def text_vectors(self, prompts):
        self.encoded = prompts
        return torch.zeros(len(prompts), 1)


def test_words_of_an_erased_kind_are_not_kept():
    words = vocabulary_words(SimpleNamespace(family=Family(), concepts=["weapons"]))
    assert not {"weapon", *KINDS["weapon"]} & {*words} and {"animal", "cat", "hammer"} < {*words}
    one = vocabulary_words(SimpleNamespace(family=Family(), concepts=["knife"]))
    assert {*OBJECTS} - {*one} == {"knife"}


def test_a_kind_becomes_another_kind_and_no_word_of_its_own(monkeypatch):
    sizes, family = [], Family()

    def similarity(concepts, words):
        sizes.append(len(words))
        return torch.zeros(1, len(words))

    monkeypatch.setattr(text_edit, "_similarity", similarity)
    run = SimpleNamespace(family=family, concepts=["animals", "boat"], erased_before=["fruit"])
    ranked = TextEdit()._near_words(run)
    assert [words[0] for words in ranked] == ["plant", "tree"] and [*map(len, ranked)] == [4, 4]
    words = family.encoded[2:]  # once for all concepts
    assert sizes == [len({*KINDS} - {"animal", "fruit"} - NO_ANCHORS), len(words)]
    assert not {"cat", "apple", "boat", "gun"} & {*words} and {"car", "vehicle"} < {*words}


def test_an_anchor_is_a_single_token(tiny_pipeline):
    family = make_family(tiny_pipeline)
    assert family.whole_words(["cat", "zebra", "knife"]) == ["cat", "knife"]
    pieces = family.pipeline.tokenizer.tokenize("catknife")
    assert len(pieces) > 1 and family.whole_words(["catknife"]) == []


def test_an_anchor_that_cannot_be_reached_is_replaced_by_the_next_nearest(tiny_pipeline, monkeypatch, caplog):
    tried = []

    def smallest(targets, kept, gram, tolerance):
        change, left = smallest_edit(targets, kept, gram, tolerance)
        tried.append(left)
        return change, torch.tensor([[0.6, 0.25, 0.9][len(tried) - 1]], dtype=left.dtype)

    monkeypatch.setattr(text_edit, "smallest_edit", smallest)
    monkeypatch.setattr(TextEdit, "_near_words", lambda *_: [["tree", "cat", "fruit"]])
    erasure = erase(tiny_pipeline, ["knife"], "text_edit")
    assert len(tried) == 2 and erasure.record.arguments["anchor_prompts"] == ["cat"]
    assert "'knife' becomes 'cat'" in caplog.text and "remains" not in caplog.text


def test_of_anchors_that_cannot_be_reached_the_best_is_taken(tiny_pipeline, monkeypatch, caplog):
    left = iter([0.6, 0.5, 0.9])

    def smallest(targets, kept, gram, tolerance):
        change, _ = smallest_edit(targets, kept, gram, tolerance)
        return change, torch.tensor([next(left)], dtype=change.dtype)

    monkeypatch.setattr(text_edit, "smallest_edit", smallest)
    monkeypatch.setattr(TextEdit, "_near_words", lambda *_: [["tree", "cat", "fruit"]])
    erasure = erase(tiny_pipeline, ["knife"], "text_edit")
    assert erasure.record.arguments["anchor_prompts"] == ["cat"] and "'knife' 50%" in caplog.text
