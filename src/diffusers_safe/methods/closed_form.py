"""What closed forms share: prompts as vectors, and new weights for the layers that read them.

A layer W `(out, d)` reads the state c `(d,)` of a token as W c. The solution of the least-squares problems that
closed forms pose is W (I + E) with the same E `(d, d)` for every such layer, so a whole edit is one small matrix.
All of it is computed in float64 on the CPU; in a batch of vectors `(n, d)` each row is one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..arguments import option
from ..concepts import is_visible, names_concept
from ..families import family_of_denoiser
from .method import Method, Run
from .vocabulary import OBJECTS, words_of_kind


NO_TEXT = " "  # encoded as the empty text; "" is what a pipeline guides away from, which for SDXL is zeros


@dataclass(kw_only=True)
class ClosedForm(Method):
    """A method that computes new weights for the layers that read prompts, without training."""

    anchor_prompts: list[str] = option(
        [],
        "What the concepts become: one prompt for all of them or one for each, in the same order. Default: no text.",
        essential=True,
    )

    def check(self, options: Any) -> None:
        concepts = options.concept.concepts
        if len(self.anchor_prompts) not in (0, 1, len(concepts)):
            raise ValueError(
                f"anchor_prompts {self.anchor_prompts}: {len(self.anchor_prompts)} for {len(concepts)} concepts; give "
                "one for all of them or one for each"
            )
        for anchor in self.anchor_prompts:
            if named := [concept for concept in concepts if names_concept(anchor, concept)]:
                raise ValueError(f"anchor_prompts '{anchor}': names {', '.join(named)}, which is to be erased")

    def edited(self, denoiser: nn.Module) -> list[str]:
        return family_of_denoiser(denoiser).text_projections(denoiser)

    def anchors(self, concepts: list[str]) -> list[str]:
        """The anchor of each concept."""
        given = [anchor if is_visible(anchor) else NO_TEXT for anchor in self.anchor_prompts] or [NO_TEXT]
        return given * len(concepts) if len(given) == 1 else given

    def prompts(self, concepts: list[str]) -> list[str]:
        return [NO_TEXT, *self.anchors(concepts)]


class EncodedPrompts:
    """Encoded prompts of a run, as batches of vectors.

    Args:
        run (`Run`): Its family encodes them.
        prompts (`list[str]`): What will be asked for.
    """

    def __init__(self, run: Run, prompts: list[str]):
        self._run, self._pooled, self._sequences = run, {}, {}
        self.add(prompts)

    def add(self, prompts: list[str]) -> None:
        """Encodes more prompts."""
        family = self._run.family
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._sequences]
        if not new:
            return
        states, pooled = family.text_states(new, next(family.denoiser.parameters()).device)
        states = states.cpu()  # float64 where they are used: with T5, a prompt has a million values
        if pooled is not None:
            self._pooled.update(zip(new, pooled.cpu().double()))
        sequences = [map(TokenSequence, states[:, place], ids) for place, ids in family.token_sequences(new)]
        self._sequences.update(zip(new, zip(*sequences)))

    def last(self, prompts: list[str]) -> torch.Tensor:
        """The last token of text of each prompt, `(len(prompts), d)`; of several sequences that of each, those of the
        first before those of the second."""
        sequences = zip(*(self._sequences[prompt] for prompt in prompts))
        return torch.stack([one.encoded[one.last].double() for sequence in sequences for one in sequence])

    def all(self, prompts: list[str]) -> torch.Tensor:
        """All tokens of all prompts, `(len(prompts) * length, d)`."""
        return torch.cat([one.states for prompt in prompts for one in self._sequences[prompt]])

    def moment(self, prompts: list[str]) -> torch.Tensor:
        """The mean of k k^T over all tokens k of all prompts, `(d, d)`."""
        sequences = [one for prompt in prompts for one in self._sequences[prompt]]
        total = sum(k.T @ k for k in (one.states for one in sequences))  # one at a time in float64
        return total / sum(len(one.encoded) for one in sequences)

    def pooled(self, prompts: list[str], others: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The pooled state of each prompt, paired with that of another prompt; twice `(n, d)`."""
        return tuple(torch.stack([self._pooled[prompt] for prompt in side]) for side in (prompts, others))

    def pooled_moment(self, prompts: list[str]) -> torch.Tensor:
        """The mean of k k^T over the pooled states k of prompts, `(d, d)`."""
        states = torch.stack([self._pooled[prompt] for prompt in prompts])
        return states.T @ states / len(states)

    def tails(self, prompts: list[str], others: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens from the last one of text to the end, paired with those of another prompt; twice `(n, d)`. The
        longer tail is cut."""
        pairs = [(a.states[a.last :], b.states[b.last :]) for a, b in self._pairs(prompts, others)]
        lengths = [min(len(tail), len(other)) for tail, other in pairs]
        return tuple(torch.cat([pair[side][:length] for pair, length in zip(pairs, lengths)]) for side in (0, 1))

    def aligned(self, prompts: list[str], others: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of each prompt whose states differ, paired with those of another prompt of the same form: words
        around the concept with the same words, padding with padding; twice `(n, d)`."""
        pairs = [_aligned(*pair) for pair in self._pairs(prompts, others)]
        return tuple(torch.cat(side) for side in zip(*pairs))

    def _pairs(self, prompts: list[str], others: list[str]) -> list[tuple["TokenSequence", "TokenSequence"]]:
        both = zip(prompts, others, strict=True)
        return [pair for prompt, other in both for pair in zip(self._sequences[prompt], self._sequences[other])]


class TokenSequence(NamedTuple):
    """A prompt in one text encoder.

    Attributes:
        encoded (`torch.Tensor`): Of all tokens, padding included, `(length, d)`.
        ids (`list[int]`): Of the tokens, with those of start and end of text and without padding.
    """

    encoded: torch.Tensor
    ids: list[int]

    @property
    def states(self) -> torch.Tensor:
        """In float64."""
        return self.encoded.double()

    @property
    def last(self) -> int:
        """The place of the last token of text; that of the first token of all for an empty text."""
        return min(max(len(self.ids) - 2, 0), len(self.encoded) - 1)


def _aligned(prompt: TokenSequence, other: TokenSequence) -> tuple[torch.Tensor, torch.Tensor]:
    same = [mine == theirs for mine, theirs in zip(prompt.ids, other.ids)]
    first, last = same.index(False) if False in same else len(same), len(prompt.encoded) - 1
    places, states = torch.arange(last + 1), prompt.states
    # A concept of more tokens than the anchor's: its surplus tokens read as the anchor's first one.
    shifted = (places + other.last - prompt.last).clamp(min(first, last), last)
    anchors = other.states[torch.where(places < first, places, shifted)]
    differ = (states != anchors).any(dim=1)  # in a causal encoder, those before the concept do not
    return states[differ], anchors[differ]


def least_squares_edit(
    erased: torch.Tensor,
    anchors: torch.Tensor,
    kept: torch.Tensor,
    erase_scale: float,
    retain_scale: float,
    identity_scale: float,
) -> torch.Tensor:
    """The E for which W' = W (I + E) minimises, for every W, equation 7 of UCE (Gandikota et al., arXiv 2308.14761):

        erase_scale sum ||W' c - W a||^2 + retain_scale sum ||W' k - W k||^2 + identity_scale ||W' - W||^2

    Args:
        erased (`torch.Tensor`): The c, `(n, d)`, float64.
        anchors (`torch.Tensor`): The a, one for each c.
        kept (`torch.Tensor`): The k, `(m, d)`.
        erase_scale, retain_scale (`float`): At least 0.
        identity_scale (`float`): Above 0, or the solution need not be unique.

    Returns:
        `torch.Tensor`: `(d, d)`.

    Raises:
        `ValueError`: If the system is singular.
    """
    identity = torch.eye(erased.shape[1], dtype=erased.dtype)
    system = identity_scale * identity + erase_scale * erased.T @ erased + retain_scale * kept.T @ kept
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise ValueError(f"identity_scale {identity_scale:g}: the system to solve is singular; give a larger one")
    return torch.cholesky_solve(erase_scale * erased.T @ (anchors - erased), factor).T


def edit_text_projections(run: Run, change: torch.Tensor, anchors: list[str]) -> None:
    """Gives every layer W that reads the tokens of prompts the weights W (I + `change`), in its own dtype."""
    names = run.family.text_projections(run.family.denoiser)
    run.edit(edited_weights(run, names, lambda weight: change), anchors)


def edited_weights(
    run: Run, names: list[str], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights W (I + E) of some layers, by name and in their own dtypes, with the E that a function gives for each
    W. Where a layer reads more than E's `(d, d)` takes, E changes how it reads the first `d` inputs."""
    parameters, edited = dict(run.family.denoiser.named_parameters()), {}
    for name, weight in _weights(run, names):
        this = change(weight)
        weight[:, : len(this)] += weight[:, : len(this)] @ this
        edited[name] = weight.to(parameters[name])
    return edited


def gram_matrix(run: Run, names: list[str], width: int) -> torch.Tensor:
    """The sum of W^T W over some layers, of their first `width` inputs, `(width, width)`."""
    return sum(weight[:, :width].T @ weight[:, :width] for _, weight in _weights(run, names))


def _weights(run: Run, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of weights in float64, one at a time: SDXL's 341 million together would take 2.7 GB."""
    parameters = dict(run.family.denoiser.named_parameters())
    for name in names:
        yield name, parameters[name].detach().to("cpu", torch.float64, copy=True)


def with_article(name: str) -> str:
    """`"knife"` -> `"a knife"`, `"axe"` -> `"an axe"`; names with a capital letter have none."""
    if name != name.lower():
        return name
    return f"{'an' if name[:1] in tuple('aeiou') else 'a'} {name}"


def phrase(form: str, name: str) -> str:
    """A name in a form, such as `"a photo of {a}"`, where `{x}` is the name and `{a}` the same with its article."""
    return form.format(x=name, a=with_article(name)) if name != NO_TEXT else NO_TEXT


def vocabulary_words(run: Run) -> list[str]:
    """The words of the vocabulary that the model knows, without those that name a concept or are of a kind that is a
    concept: where weapons are erased, knives are not kept."""
    gone = {word for concept in run.concepts for word in words_of_kind(concept)}
    return run.family.known_words(
        [word for word in OBJECTS if word not in gone and not _names_any(word, run.concepts)]
    )


def vocabulary_prompts(
    run: Run, words: Sequence[str] | None = None, contexts: Sequence[str] = ("{x}",), each: int = 1
) -> list[str]:
    """Each word, by default those of [`vocabulary_words`], in `each` of the contexts in turn, but what names a
    concept."""
    forms = run.family.known_forms(contexts)
    places, words = range(min(each, len(forms))), vocabulary_words(run) if words is None else words
    prompts = [phrase(forms[(i + place) % len(forms)], word) for i, word in enumerate(words) for place in places]
    return [prompt for prompt in prompts if not _names_any(prompt, run.concepts)]


def _names_any(prompt: str, concepts: list[str]) -> bool:
    return any(names_concept(prompt, concept) for concept in concepts)


def check_distinct(erased: torch.Tensor, anchors: torch.Tensor, concepts: list[str], names: list[str]) -> None:
    """Checks the vectors `(n, d)` of concepts and of their anchors, a row for each.

    Raises:
        `ValueError`: If a concept encodes as its anchor does, or there are more concepts than dimensions.
    """
    # Several sequences of tokens give several rows for each concept.
    same = (erased == anchors).all(dim=1).view(-1, len(concepts)).all(dim=0).tolist()
    for is_same, concept, name in zip(same, concepts, names, strict=True):
        if is_same:
            becomes = f"the anchor '{name}'" if is_visible(name) else "the empty prompt"
            raise ValueError(f"concepts '{concept}': encodes as {becomes} does; give another of anchor_prompts")
    if len(concepts) > (width := erased.shape[1]):
        raise ValueError(f"concepts: {len(concepts)} at once are more than the {width} dimensions of encoded prompts")
