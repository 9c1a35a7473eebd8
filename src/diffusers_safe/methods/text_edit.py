"""A closed form of this package: the smallest edit that makes a concept read as its anchor in every phrasing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..arguments import option
from ..concepts import names_concept
from ..families import family_of_denoiser
from ..messages import note
from .closed_form import (
    ClosedForm,
    EncodedPrompts,
    check_distinct,
    edited_weights,
    gram_matrix,
    phrase,
    vocabulary_prompts,
    vocabulary_words,
)
from .method import Run, register_method
from .vocabulary import KINDS, NO_ANCHORS, OBJECTS, STYLES, words_of_kind


# {x} is a name, {a} the same with its article. Models that do not know a form's words go without it.
PHRASINGS = {
    "object": (
        "{x}", "{a}", "{a} on a red background", "{a} in sketch style", "{x}, white background",
        "{a} on a blue background in sepia style", "a photo of {a}", "a painting of {a} in the forest",
    ),
    "style": (
        "{x}", "{x} style", "a tree in {x} style", "a cat on a red background in {x} style", "a car, {x} style",
        "a painting by {x}", "a house in the style of {x}",
    ),
}  # fmt: skip
CONTEXTS = PHRASINGS["object"]  # of what is kept, in turn: as many for each word as there are concepts
# Prompts to encode, which takes most of the time with text encoders of usual size.
MOST_WORDS = 128
MOST_KEPT = 64  # for each of up to four concepts
MOST_PHRASED = 384  # of concepts and anchors; at least two of each
MOST_ROUNDS = 60
MOST_WEIGHT = 0.4  # of all concepts together against all that is kept
NEGLIGIBLE = 1e-3  # singular values of a concept's tokens, of the largest


@register_method
@dataclass(kw_only=True)
class TextEdit(ClosedForm):
    """The options of the text edit.

    With the states c of all tokens of a concept's phrasings, each paired with the state a of the same phrasing of the
    anchor, and the states k of the prompts to keep, the edit E is the solution of

        minimise  mean ||E k||^2   subject to   mean ||W (E c - (a - c))||^2 <= tolerance^2 mean ||W (a - c)||^2

    for each concept, the norms ||W .|| over all layers W that read prompts. The multiplier of each constraint is the
    weight of its concept in a least-squares problem like UCE's (Gandikota et al., arXiv 2308.14761), so no weight has
    to be chosen. It differs from UCE also in the tokens: in a causal text encoder those behind the concept, padding
    included, carry it as well. A layer that reads the pooled state of prompts (SDXL, SD3) is edited in the
    same way.
    """

    name = "text_edit"
    title = "Text edit"
    authors = "diffusers_safe"
    paper = ""
    summary = "All tokens of the concept's phrasings are read as an anchor's, by the edit that changes others least."

    phrasings: str = option("object", f"What the concepts are: {' or '.join(PHRASINGS)}.", PHRASINGS, essential=True)
    tolerance: float = option(
        0.25,
        "How much of the difference between concept and anchor may remain in keys and values; less erases more and "
        "changes other prompts more.",
        above=0,
        below=1,
        essential=True,
    )
    unconditional_weight: float = option(
        0.4, "Share of the unconditional prompt among what is kept: guidance takes it in every image.", at_least=0,
        below=1,
    )  # fmt: skip

    def edited(self, denoiser: nn.Module) -> list[str]:
        pooled = family_of_denoiser(denoiser).pooled_projection(denoiser)
        return [*super().edited(denoiser), *([pooled] if pooled else [])]

    def prompts(self, concepts: list[str]) -> list[str]:
        phrased = [phrase(form, concept) for concept in concepts for form in PHRASINGS[self.phrasings]]
        return [*super().prompts(concepts), *phrased]

    def erase(self, run: Run) -> None:
        anchors = self._chosen_anchors(run)
        forms = run.family.known_forms(PHRASINGS[self.phrasings])
        phrased = [
            tuple([phrase(form, name) for form in some_forms(forms, place, len(run.concepts))] for name in pair)
            for place, pair in enumerate(zip(run.concepts, anchors))
        ]
        kept = self._kept_prompts(run)
        # What was erased before stays erased: the layers read it as they do now.
        retained = [*run.retained, *(phrase(form, name) for name in run.erased_before for form in forms)]
        encoded = EncodedPrompts(
            run, [*(text for pair in phrased for side in pair for text in side), *kept, *retained, ""]
        )
        plain = ([pair[side][0] for pair in phrased] for side in (0, 1))
        check_distinct(*map(encoded.last, plain), run.concepts, anchors)
        edited, left = {}, torch.zeros(len(run.concepts), dtype=torch.float64)
        for layers, moment_of, paired in self._readers(run, encoded):
            parts = [moment_of(prompts) for prompts in (kept, retained) if prompts]
            moment = self._kept_moment(parts, moment_of([""]))
            gram = gram_matrix(run, layers, len(moment))
            targets = [Target.of(*paired(*pair), gram) for pair in phrased]
            change, remaining = smallest_edit(targets, moment, gram, self.tolerance)
            edited |= edited_weights(run, layers, lambda weight, change=change: change)
            left = torch.maximum(left, remaining)
        much = [
            f"'{concept}' {share:.0%}"
            for concept, share in zip(run.concepts, left.tolist())
            if share > 1.1 * self.tolerance
        ]
        if much:
            note(
                "more than tolerance %g of the difference from the anchor remains, because other prompts would change "
                "too much: %s",
                self.tolerance,
                ", ".join(much),
            )
        run.edit(edited, anchors)

    def _readers(self, run: Run, encoded: EncodedPrompts) -> list[tuple[list[str], Callable, Callable]]:
        """The layers that read the tokens of prompts, and the one that reads the pooled state, if there is one; each
        with the mean of k k^T over what it reads of prompts, and what it reads of pairs of concept and anchor."""
        tokens, pooled = super().edited(run.family.denoiser), run.family.pooled_projection(run.family.denoiser)
        readers = [(tokens, encoded.moment, encoded.aligned)]
        if pooled:
            readers.append(([pooled], encoded.pooled_moment, encoded.pooled))
        return readers

    def _chosen_anchors(self, run: Run) -> list[str]:
        if self.anchor_prompts:
            return self.anchors(run.concepts)
        gone = [*run.concepts, *run.erased_before]
        gone += [word for concept in gone for word in words_of_kind(concept)]
        words = [word for word in (OBJECTS if self.phrasings == "object" else STYLES) if word not in NO_ANCHORS]
        words = run.family.whole_words([word for word in words if not _are_related(word, gone)])
        if not words:
            raise ValueError("anchor_prompts: the model knows no word of the vocabulary; give an anchor")
        kinds = [word for word in words if word in KINDS]
        chosen = []
        for concept in run.concepts:  # a kind becomes another kind
            candidates = kinds if words_of_kind(concept) and kinds else words
            nearest = int(_similarity(run, [concept], candidates).argmax())
            chosen.append(candidates[nearest])
        for concept, anchor in zip(run.concepts, chosen):
            note("'%s' becomes '%s' (--anchor_prompts chooses another)", concept, anchor)
        return chosen

    def _kept_prompts(self, run: Run) -> list[str]:
        """Words of the vocabulary in varying contexts: all that the model knows or, of too many, those nearest to the
        concepts and as many of all others."""
        words, count = vocabulary_words(run), len(run.concepts)
        most = MOST_KEPT * min(count, 4)
        if len(words) > (limit := min(MOST_WORDS, most)):
            near = _similarity(run, run.concepts, words).amax(dim=0).argsort(descending=True)[: limit // 2].tolist()
            rest = [place for place in range(len(words)) if place not in set(near)]
            words = [words[i] for i in sorted([*near, *rest[:: -(-len(rest) // (limit - len(near)))]])]
        return vocabulary_prompts(run, words, CONTEXTS, each=min(count, most // max(len(words), 1)))

    def _kept_moment(self, kept: list[torch.Tensor], nothing: torch.Tensor) -> torch.Tensor:
        """The mean of k k^T over what is kept, `(d, d)`: parts of equal weight, and the unconditional prompt."""
        share = self.unconditional_weight
        return (1 - share) * sum(kept) / max(len(kept), 1) + share * nothing


def some_forms(forms: Sequence[str], place: int, count: int) -> list[str]:
    """The phrasings of one of `count` concepts, the first of `forms` and others in turn, so that all concepts have at
    most `MOST_PHRASED` with their anchors."""
    number = min(len(forms), max(2, MOST_PHRASED // (2 * count)))
    others = forms[1:]
    return [forms[0], *(others[(place * (number - 1) + i) % len(others)] for i in range(number - 1))]


def _similarity(run: Run, concepts: list[str], words: list[str]) -> torch.Tensor:
    """How near concepts and words are in the text encoder, `(len(concepts), len(words))`."""
    vectors = run.family.text_vectors([*concepts, *words])
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(dim=0), dim=1)
    return vectors[: len(concepts)] @ vectors[len(concepts) :].T


def _are_related(word: str, concepts: list[str]) -> bool:
    return any(names_concept(word, concept) or names_concept(concept, word) for concept in concepts)


class Target(NamedTuple):
    """What an edit should do with the tokens of one concept.

    Attributes:
        states (`torch.Tensor`): The c, `(n, d)`, each divided by the root of their number.
        differences (`torch.Tensor`): The a - c, likewise.
        size (`float`): mean ||W (a - c)||^2.
    """

    states: torch.Tensor
    differences: torch.Tensor
    size: float

    @classmethod
    def of(cls, erased: torch.Tensor, anchors: torch.Tensor, gram: torch.Tensor) -> "Target":
        """From the tokens of all phrasings; many are nearly equal, so a few combinations of them stand for all."""
        width = erased.shape[1]
        both = torch.cat([erased, anchors - erased], dim=1) / len(erased) ** 0.5
        values, vectors = torch.linalg.eigh(both @ both.T)  # much faster than the singular values of wide states
        rows = vectors[:, values > NEGLIGIBLE**2 * values[-1]].T @ both
        states, differences = rows[:, :width], rows[:, width:]
        return cls(states, differences, _size(differences, gram))


def _size(vectors: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((vectors @ gram) * vectors).sum())


def smallest_edit(
    targets: list[Target], kept: torch.Tensor, gram: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The E that changes what is kept least while each concept's residual is at most `tolerance`.

    For given weights of the concepts the solution is that of a least-squares problem. The weights are found by a
    multiplicative update: a concept whose residual is too large gets more, up to its share of `MOST_WEIGHT`. A concept
    that needs more than that is too close to what is kept, and its residual stays larger.

    Args:
        targets (`list[Target]`): One for each concept.
        kept (`torch.Tensor`): Mean of k k^T, `(d, d)`.
        gram (`torch.Tensor`): Sum of W^T W, `(d, d)`.
        tolerance (`float`): In (0, 1), relative to the concept's difference from its anchor.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: E, `(d, d)`, and the residual of each concept, `(len(targets),)`.
    """
    width = len(kept)
    base = kept + 1e-6 * kept.trace() / width * torch.eye(width, dtype=kept.dtype)
    states, differences = map(torch.cat, list(zip(*targets))[:2])
    rows = [len(target.states) for target in targets]
    most = MOST_WEIGHT / len(targets)
    weights = torch.full((len(targets),), most / 4, dtype=kept.dtype)
    for _ in range(MOST_ROUNDS):
        weighted = torch.repeat_interleave(weights, torch.tensor(rows))[:, None] * states
        change = torch.linalg.solve(base + weighted.T @ states, weighted.T @ differences).T
        remaining = (states @ change.T - differences).split(rows)
        sizes = [_size(one, gram) / target.size for one, target in zip(remaining, targets)]
        left = torch.tensor(sizes, dtype=kept.dtype).sqrt()
        reached = (left - tolerance).abs() <= 0.02 * tolerance
        if (reached | ((left > tolerance) & (weights == most))).all():
            break
        weights = (weights * (left / tolerance) ** 1.5).clamp(max=most)
    return change, left
