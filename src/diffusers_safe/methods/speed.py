"""SPEED: Scalable, Precise, and Efficient Concept Erasure, Li et al., ICLR 2026, arXiv 2503.07392."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..arguments import option
from ..families import family_of_denoiser
from .closed_form import NO_TEXT, ClosedForm, EncodedPrompts, check_distinct, edited_weights, vocabulary_prompts
from .method import Preset, Run, preset_option, register_method


CENTRES = 3  # of the tokens of the empty prompt, which stay exactly
SPEED_PRESETS = {
    "instance": Preset("github.com/Ouxiang-Li/SPEED, README.md", {}),
    "style": Preset("github.com/Ouxiang-Li/SPEED, README.md", {"anchor_prompts": ["art"]}),
}


@register_method
@dataclass(kw_only=True)
class SPEED(ClosedForm):
    """The options of SPEED. Without --retain_prompts the words of this package's vocabulary are retained; the authors
    have lists of instances, styles and celebrities."""

    name = "speed"
    title = "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models"
    authors = "Li et al., ICLR 2026"
    paper = "2503.07392"
    summary = "Values of the concept become those of an anchor, in the null space of what is retained."
    presets: ClassVar[dict[str, Preset]] = SPEED_PRESETS

    preset: str = preset_option("instance", SPEED_PRESETS)
    null_threshold: float = option(
        0.1, "Singular values of the retained tokens' mean square below this count as zero.", above=0
    )
    augmentations: int = option(10, "Noisy copies of each retained token.", at_least=0)
    identity_scale: float = option(1.0, "Weight s of the distance from the base model's weights.", above=0)
    unconditional_slack: float = option(0.0, "Weight mu that lets the empty prompt's tokens move.", at_least=0)

    def edited(self, denoiser: nn.Module) -> list[str]:
        return family_of_denoiser(denoiser).text_values(denoiser)

    def erase(self, run: Run) -> None:
        anchors, kept = self.anchors(run.concepts), run.retained or vocabulary_prompts(run)
        if not kept:
            raise ValueError("retain_prompts: the model knows no word of the vocabulary; name what to retain")
        encoded = EncodedPrompts(run, [*run.concepts, *anchors, *kept, NO_TEXT])
        erased, targets, retained = (encoded.last(prompts) for prompts in (run.concepts, anchors, kept))
        check_distinct(erased, targets, run.concepts, anchors)
        constraints = _fixed_tokens(encoded.all([NO_TEXT]))
        edited = edited_weights(
            run,
            self.edited(run.family.denoiser),
            lambda weight: self.change(weight, erased, targets, retained, constraints),
        )
        run.edit(edited, anchors)

    def change(
        self,
        weight: torch.Tensor,
        erased: torch.Tensor,
        targets: torch.Tensor,
        retained: torch.Tensor,
        constraints: torch.Tensor,
    ) -> torch.Tensor:
        """The E of one layer W, for which its new weights are W (I + E):

            E = (A - T) P [I - M N (N^T P M N + mu I)^-1 N^T P] M,    M = (T P + s I)^-1

        with T the mean of c c^T, A that of a c^T, P the projector on the null space of the mean of k k^T over those
        retained k that the edit would move most, and N the tokens that stay exactly.

        Args:
            weight (`torch.Tensor`): W, `(out, d)`, float64.
            erased, targets (`torch.Tensor`): The c and their a, `(n, d)`.
            retained (`torch.Tensor`): The k, `(m, d)`.
            constraints (`torch.Tensor`): The columns of N as rows, `(CENTRES + 1, d)`.

        Returns:
            `torch.Tensor`: `(d, d)`.
        """
        identity = torch.eye(weight.shape[1], dtype=weight.dtype)
        square, difference = erased.T @ erased / len(erased), (targets - erased).T @ erased / len(erased)
        kept = self._most_moved(weight, weight @ difference @ torch.linalg.inv(identity + square), retained)
        vectors, values, _ = torch.linalg.svd(kept.T @ kept / len(kept))
        null = vectors[:, values < self.null_threshold]
        projector = null @ null.T
        inverse = torch.linalg.inv(square @ projector + self.identity_scale * identity)
        fixed = constraints.T
        inner = fixed.T @ projector @ inverse @ fixed
        inner = inner + self.unconditional_slack * torch.eye(len(inner), dtype=weight.dtype)
        held = identity - inverse @ fixed @ torch.linalg.pinv(inner) @ fixed.T @ projector
        return difference @ projector @ held @ inverse

    def _most_moved(self, weight: torch.Tensor, change: torch.Tensor, retained: torch.Tensor) -> torch.Tensor:
        """The retained tokens, and noisy copies of them, that an unconstrained edit moves more than the mean. The
        noise has the direction that the layer reads least."""
        generator = torch.Generator().manual_seed(0)
        chosen = [_above_mean(change, retained)]
        direction = torch.linalg.svd(weight, full_matrices=True)[2][-1]
        for _ in range(self.augmentations):
            noise = torch.randn(chosen[0].shape, generator=generator, dtype=weight.dtype)
            chosen.append(_above_mean(change, chosen[0] + torch.outer(noise @ direction, direction)))
        return torch.cat(chosen)


def _above_mean(change: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    moved = (tokens @ change.T).norm(dim=1)
    return tokens[moved >= moved.mean()]


def _fixed_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """The first token of the empty prompt `(length, d)`, and centres of its others by k-means."""
    rest = tokens[1:]
    centres = rest[torch.linspace(0, len(rest) - 1, CENTRES).long()]
    for _ in range(20):
        nearest = torch.cdist(rest, centres).argmin(dim=1)
        centres = torch.stack([rest[nearest == i].mean(dim=0) if (nearest == i).any() else centres[i]
                               for i in range(CENTRES)])  # fmt: skip
    return torch.cat([tokens[:1], centres])
