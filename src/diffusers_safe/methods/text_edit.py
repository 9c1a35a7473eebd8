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
MOST_KEPT = 64  # for each of up to `FEW` concepts
MOST_PHRASED = 384  # of concepts and anchors; at least two of each
FEW = 4  # concepts at once, for which other anchors are tried
MOST_ANCHORS = 4
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

    anchor_prompts: list[str] = option(
        [],
        "What the concepts become: one prompt for all of them or one for each, in the same order. Default: for each "
        "the nearest word of the vocabulary.",
        essential=True,
    )
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
        forms = run.family.known_forms(PHRASINGS[self.phrasings])
        concepts = _phrased(forms, run.concepts)
        kept = self._kept_prompts(run)
        # What was erased before stays erased: the layers read it as they do now.
        retained = [*run.retained, *(phrase(form, name) for name in run.erased_before for form in forms)]
        encoded = EncodedPrompts(run, [*(text for texts in concepts for text in texts), *kept, *retained, ""])
        readers = self._readers(run, encoded, [prompts for prompts in (kept, retained) if prompts])
        ranked = [[anchor] for anchor in self.anchors(run.concepts)] if self.anchor_prompts else self._near_words(run)
        places, best = [0] * len(ranked), None
        while True:  # an anchor that cannot be reached is replaced by the next nearest
            anchors = [words[place] for words, place in zip(ranked, places)]
            texts = _phrased(forms, anchors)
            encoded.add([text for one in texts for text in one])
            plain = ([one[0] for one in side] for side in (concepts, texts))
            check_distinct(*map(encoded.last, plain), run.concepts, anchors)
            edit = self._edit(readers, concepts, texts, anchors)
            best = edit if best is None else min(best, edit, key=lambda edit: edit.excess(self.tolerance))
            far = [i for i in edit.out_of_reach(self.tolerance) if places[i] + 1 < len(ranked[i])]
            if not far:
                break
            for i in far:
                places[i] += 1
        self._report(run.concepts, best)
        edited = {}
        for reader, change in zip(readers, best.changes):
            edited |= edited_weights(run, reader.layers, lambda weight, change=change: change)
        run.edit(edited, best.anchors)

    def _readers(self, run: Run, encoded: EncodedPrompts, kept: list[list[str]]) -> list["Reader"]:
        """The layers that read the tokens of prompts, and the one that reads the pooled state, if there is one."""
        tokens, pooled = super().edited(run.family.denoiser), run.family.pooled_projection(run.family.denoiser)
        sources = [(tokens, encoded.moment, encoded.aligned)]
        if pooled:
            sources.append(([pooled], encoded.pooled_moment, encoded.pooled))
        readers, share = [], self.unconditional_weight
        for layers, moment_of, paired in sources:
            parts = sum(map(moment_of, kept)) / max(len(kept), 1)
            moment = (1 - share) * parts + share * moment_of([""])
            readers.append(Reader(layers, moment, gram_matrix(run, layers, len(moment)), paired))
        return readers

    def _edit(
        self, readers: list["Reader"], concepts: list[list[str]], texts: list[list[str]], anchors: list[str]
    ) -> "Edit":
        changes, left = [], torch.zeros(len(concepts), dtype=torch.float64)
        for reader in readers:
            targets = [Target.of(*reader.paired(*pair), reader.gram) for pair in zip(concepts, texts)]
            change, remaining = smallest_edit(targets, reader.kept, reader.gram, self.tolerance)
            changes.append(change)
            left = torch.maximum(left, remaining)
        return Edit(anchors, changes, left)

    def _report(self, concepts: list[str], edit: "Edit") -> None:
        if not self.anchor_prompts:
            for concept, anchor in zip(concepts, edit.anchors):
                note("'%s' becomes '%s' (--anchor_prompts chooses another)", concept, anchor)
        if much := [f"'{concepts[i]}' {edit.left[i]:.0%}" for i in edit.out_of_reach(self.tolerance)]:
            note(
                "more than tolerance %g of the difference from the anchor remains, because other prompts would change "
                "too much: %s",
                self.tolerance,
                ", ".join(much),
            )

    def _near_words(self, run: Run) -> list[list[str]]:
        """For each concept, the words of the vocabulary that may replace it, the nearest first."""
        gone = [*run.concepts, *run.erased_before]
        gone += [word for concept in gone for word in words_of_kind(concept)]
        words = [word for word in (OBJECTS if self.phrasings == "object" else STYLES) if word not in NO_ANCHORS]
        words = run.family.whole_words([word for word in words if not _are_related(word, gone)])
        if not words:
            raise ValueError("anchor_prompts: the model knows no word of the vocabulary; give an anchor")
        concepts, vectors = run.family.text_vectors([*run.concepts, *words]).split([len(run.concepts), len(words)])
        places = list(range(len(words)))
        kinds = [place for place in places if words[place] in KINDS]
        count, ranked = MOST_ANCHORS if len(run.concepts) <= FEW else 1, []
        for concept, vector in zip(run.concepts, concepts):  # a kind becomes another kind
            candidates = kinds if words_of_kind(concept) and kinds else places
            order = _similarity(vector[None], vectors[candidates])[0].argsort(descending=True, stable=True)[:count]
            ranked.append([words[candidates[i]] for i in order.tolist()])
        return ranked

    def _kept_prompts(self, run: Run) -> list[str]:
        """Words of the vocabulary in varying contexts: all that the model knows or, of too many, those nearest to the
        concepts and as many of all others."""
        words, count = vocabulary_words(run), len(run.concepts)
        most = MOST_KEPT * min(count, FEW)
        if len(words) > (limit := min(MOST_WORDS, most)):
            vectors = run.family.text_vectors([*run.concepts, *words])
            near = _similarity(vectors[:count], vectors[count:]).amax(dim=0).argsort(descending=True)
            near = near[: limit // 2].tolist()
            rest = [place for place in range(len(words)) if place not in set(near)]
            words = [words[i] for i in sorted([*near, *rest[:: -(-len(rest) // (limit - len(near)))]])]
        return vocabulary_prompts(run, words, CONTEXTS, each=min(count, most // max(len(words), 1)))


class Reader(NamedTuple):
    """Layers that read the same part of prompts.

    Attributes:
        layers (`list[str]`): Their weights.
        kept (`torch.Tensor`): Mean of k k^T over what they read of the prompts to keep, `(d, d)`.
        gram (`torch.Tensor`): Sum of W^T W, `(d, d)`.
        paired (`Callable`): What they read of prompts and, in pairs, of others; twice `(n, d)`.
    """

    layers: list[str]
    kept: torch.Tensor
    gram: torch.Tensor
    paired: Callable[[list[str], list[str]], tuple[torch.Tensor, torch.Tensor]]


class Edit(NamedTuple):
    """An edit: the anchor of each concept, E of each [`Reader`], and the share of each concept's difference from its
    anchor that remains."""

    anchors: list[str]
    changes: list[torch.Tensor]
    left: torch.Tensor

    def out_of_reach(self, tolerance: float) -> list[int]:
        """The concepts of which clearly more remains."""
        return (self.left > 1.1 * tolerance).nonzero().flatten().tolist()

    def excess(self, tolerance: float) -> float:
        return float((self.left - tolerance).clamp_min(0).sum())


def _phrased(forms: Sequence[str], names: list[str]) -> list[list[str]]:
    """The phrasings of each name."""
    return [[phrase(form, name) for form in some_forms(forms, place, len(names))] for place, name in enumerate(names)]


def some_forms(forms: Sequence[str], place: int, count: int) -> list[str]:
    """The phrasings of one of `count` concepts, the first of `forms` and others in turn, so that all concepts have at
    most `MOST_PHRASED` with their anchors."""
    number = min(len(forms), max(2, MOST_PHRASED // (2 * count)))
    others = forms[1:]
    return [forms[0], *(others[(place * (number - 1) + i) % len(others)] for i in range(number - 1))]


def _similarity(concepts: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The cosine of the vectors of concepts and of words around the mean of both, `(len(concepts), len(words))`."""
    vectors = torch.cat([concepts, words])
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
        if len(both) > both.shape[1]:  # as many rows as columns have the same sums of products
            both = torch.linalg.qr(both, mode="r").R
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
