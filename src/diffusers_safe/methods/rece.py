"""RECE: Reliable and Efficient Concept Erasure, Gong et al., ECCV 2024, arXiv 2407.12383."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..arguments import option
from .closed_form import (
    NO_TEXT,
    ClosedForm,
    EncodedPrompts,
    check_distinct,
    edit_text_projections,
    gram_matrix,
    least_squares_edit,
)
from .method import Preset, Run, preset_option, register_method
from .uce import UCE


_SOURCE = "github.com/CharlesGong12/RECE, README.md"
RECE_PRESETS = {
    "nudity": Preset(_SOURCE, {"rounds": 3, "norm_scale": 0.1}),
    "unsafe": Preset(_SOURCE, {"rounds": 2, "norm_scale": 0.1}),
    "style": Preset(_SOURCE, {"rounds": 1, "norm_scale": 1e-3}),
    "object": Preset(_SOURCE, {"rounds": 1, "norm_scale": 1e-3}),
}


@register_method
@dataclass(kw_only=True)
class RECE(ClosedForm):
    """The options of RECE. The authors keep the round whose images a detector likes best; here all rounds are done."""

    name = "rece"
    title = "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models"
    authors = "Gong et al., ECCV 2024"
    paper = "2407.12383"
    summary = "UCE, then rounds that find the embeddings which still produce the concept, and edit them as well."
    presets: ClassVar[dict[str, Preset]] = RECE_PRESETS

    preset: str = preset_option("nudity", RECE_PRESETS)
    rounds: int = option(3, "Rounds after UCE; 0 is UCE alone.", at_least=0, essential=True)
    norm_scale: float = option(
        0.1, "Weight lambda of the norm of the embeddings that are searched; less finds stronger ones.", above=0
    )
    erase_scale: float = option(1.0, "Weight of the tokens that are found.", above=0)
    retain_scale: float = option(0.1, "Weight of the tokens of --retain_prompts, or of the empty prompt.", at_least=0)
    identity_scale: float = option(0.1, "Weight of the distance from the weights before the round.", above=0)

    def erase(self, run: Run) -> None:
        anchors, kept = self.anchors(run.concepts), run.retained or [NO_TEXT] * len(run.concepts)
        encoded = EncodedPrompts(run, [*run.concepts, *anchors, *kept, NO_TEXT])
        check_distinct(encoded.last(run.concepts), encoded.last(anchors), run.concepts, anchors)
        first = UCE(tokens="tail", retain_scale=1.0)
        change = first.change(encoded, run.concepts, anchors, [NO_TEXT, *run.retained])
        identity = torch.eye(len(change), dtype=change.dtype)
        gram = gram_matrix(run, self.edited(run.family.denoiser), len(change))
        concepts, targets, retained = (encoded.all(prompts) for prompts in (run.concepts, anchors, kept))
        for _ in range(self.rounds):
            found = equivalent_embeddings(concepts, identity + change, gram, self.norm_scale)
            scales = self.erase_scale, self.retain_scale, self.identity_scale
            step = least_squares_edit(found, targets, retained, *scales)
            change = change + step + change @ step  # (I + change) (I + step) - I
        edit_text_projections(run, change, anchors)


def equivalent_embeddings(
    concepts: torch.Tensor, edited: torch.Tensor, gram: torch.Tensor, norm_scale: float
) -> torch.Tensor:
    """The embeddings c' that an edited model reads as the base model reads c, for all layers W at once:

        c' = argmin sum_W ||W' c' - W c||^2 + norm_scale ||c'||^2,    W' = W edited

    Args:
        concepts (`torch.Tensor`): The c, `(n, d)`.
        edited (`torch.Tensor`): I + E of the edit so far, `(d, d)`.
        gram (`torch.Tensor`): Sum of W^T W, `(d, d)`.
        norm_scale (`float`): Above 0.

    Returns:
        `torch.Tensor`: `(n, d)`.
    """
    system = norm_scale * torch.eye(len(gram), dtype=gram.dtype) + edited.T @ gram @ edited
    return torch.linalg.solve(system, edited.T @ gram @ concepts.T).T
