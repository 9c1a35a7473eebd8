"""The words that methods keep, and the kinds among them."""

from types import SimpleNamespace

import pytest

from diffusers_safe.families import make_family
from diffusers_safe.methods import text_edit
from diffusers_safe.methods.closed_form import vocabulary_words
from diffusers_safe.methods.text_edit import TextEdit
from diffusers_safe.methods.vocabulary import KINDS, NO_ANCHORS, OBJECTS, words_of_kind


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


def test_words_of_an_erased_kind_are_not_kept():
    words = vocabulary_words(SimpleNamespace(family=Family(), concepts=["weapons"]))
    assert not {"weapon", *KINDS["weapon"]} & {*words} and {"animal", "cat", "hammer"} < {*words}
    one = vocabulary_words(SimpleNamespace(family=Family(), concepts=["knife"]))
    assert {*OBJECTS} - {*one} == {"knife"}


def test_a_kind_becomes_another_kind_and_no_word_of_its_own(monkeypatch):
    asked = []

    def similarity(run, concepts, words):
        asked.append(words)
        return text_edit.torch.zeros(1, len(words))

    monkeypatch.setattr(text_edit, "_similarity", similarity)
    run = SimpleNamespace(family=Family(), concepts=["animals", "boat"], erased_before=["fruit"])
    assert TextEdit()._chosen_anchors(run) == ["plant", "tree"]
    kinds, words = asked
    assert {*kinds} == {*KINDS} - {"animal", "fruit"} - NO_ANCHORS
    assert not {"cat", "apple", "boat", "gun"} & {*words} and {"car", "vehicle"} < {*words}


def test_an_anchor_is_a_single_token(tiny_pipeline):
    family = make_family(tiny_pipeline)
    assert family.whole_words(["cat", "zebra", "knife"]) == ["cat", "knife"]
    pieces = family.pipeline.tokenizer.tokenize("catknife")
    assert len(pieces) > 1 and family.whole_words(["catknife"]) == []
