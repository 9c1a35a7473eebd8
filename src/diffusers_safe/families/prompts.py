"""What a tokenizer makes of prompts and concepts."""

import re

from diffusers.loaders import TextualInversionLoaderMixin
from transformers import PreTrainedTokenizerBase

from ..messages import note


def check_lengths(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        `ValueError`: If a prompt has more tokens than the model takes.
    """
    for prompt in prompts:
        count = len(token_ids(prompt, tokenizer))
        if count > tokenizer.model_max_length:
            raise ValueError(
                f"prompt '{prompt[:60]}...' has {count} tokens; this model takes {tokenizer.model_max_length}, "
                "and what is cut would not be trained"
            )


def token_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a prompt, with those of start and end of text. As in the pipelines, a learned word may stand for
    several."""
    text = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    return tokenizer(text, verbose=False).input_ids  # or it warns of what `check_lengths` refuses


def unknown_words(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """The words of a text that a tokenizer does not know, with the tokens it makes of them: an unknown-word token, or
    so many pieces that they have fewer than two letters each, as when a word is spelled byte by byte. (CLIP's makes
    pieces of two letters and more of names that are in no dictionary.)"""
    for token in tokenizer.get_added_vocab():
        text = text.replace(token, " ")
    unknown = {}
    for word in re.findall(r"[^\W\d_]+|[^\w\s]", text):
        pieces = [piece for piece in tokenizer.tokenize(word) if piece != "▁"]
        if not pieces or tokenizer.unk_token in pieces or (len(pieces) > 1 and len(word) < 2 * len(pieces)):
            unknown[word] = pieces
    return unknown


def warn_of_unknown_words(concepts: list[str], tokenizers: list[PreTrainedTokenizerBase], option: str) -> None:
    """Warns of concepts with words that none of a model's tokenizers knows, and of those that encode as no text."""
    for concept in concepts:
        if all(tokenizer(concept).input_ids == tokenizer("").input_ids for tokenizer in tokenizers):
            note("%s '%s': encodes as the empty prompt does, so there is nothing to erase", option, concept)
            continue
        found = [unknown_words(concept, tokenizer) for tokenizer in tokenizers]
        if unknown := {word: pieces for word, pieces in found[0].items() if all(word in other for other in found)}:
            words = ", ".join(f"'{word}' ({len(pieces)} pieces)" for word, pieces in unknown.items())
            note(
                "%s '%s': the model's tokenizer does not know %s; the model may not know it either, and erasing it "
                "may change nothing",
                option,
                concept,
                words,
            )
