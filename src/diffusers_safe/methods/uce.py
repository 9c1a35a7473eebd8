"""UCE: Unified Concept Editing, Gandikota et al., WACV 2024, arXiv 2308.14761."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..arguments import option
from .closed_form import (
    NO_TEXT,
    ClosedForm,
    EncodedPrompts,
    check_distinct,
    edit_text_projections,
    least_squares_edit,
)
from .method import Preset, Run, preset_option, register_method


TOKENS = ("last", "tail")
# Of the authors' scripts, which both add them on request (`expand_prompts`, `add_prompts`).
PHRASINGS = {
    "none": (),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
    "style": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
}
_SOURCE = "github.com/rohitgandikota/unified-concept-editing"
UCE_PRESETS = {
    "2025": Preset(
        f"{_SOURCE}, trainscripts/uce_sd_erase.py, concept type object",
        {"tokens": "last", "erase_scale": 1.0, "retain_scale": 1.0, "identity_scale": 0.5},
    ),
    "2025-style": Preset(
        f"{_SOURCE}, trainscripts/uce_sd_erase.py, concept type art",
        {"tokens": "last", "erase_scale": 1.0, "retain_scale": 1.0, "identity_scale": 0.5, "anchor_prompts": ["art"]},
    ),
    "2023": Preset(
        f"{_SOURCE}, train-scripts/train_erase.py",
        {"tokens": "tail", "erase_scale": 1.0, "retain_scale": 0.1, "identity_scale": 0.5},
    ),
}


@register_method
@dataclass(kw_only=True)
class UCE(ClosedForm):
    """The options of UCE."""

    name = "uce"
    title = "Unified Concept Editing in Diffusion Models"
    authors = "Gandikota et al., WACV 2024"
    paper = "2308.14761"
    summary = "Keys and values of the concept's last token become those of an anchor, by least squares."
    presets: ClassVar[dict[str, Preset]] = UCE_PRESETS

    preset: str = preset_option("2025", UCE_PRESETS)
    tokens: str = option(
        "last",
        "Which tokens are edited: last (the concept's last one; of retained prompts, too) or tail (all from the last "
        "one to the end of the padding; of retained prompts, and of the empty one, all tokens).",
        TOKENS,
    )
    phrasings: str = option(
        "none",
        "Edit the concept in the authors' five phrasings, too: object ('photo of X') or style ('painting by X').",
        PHRASINGS,
    )
    erase_scale: float = option(1.0, "Weight of the erased tokens.", above=0)
    retain_scale: float = option(1.0, "Weight of the tokens of --retain_prompts.", at_least=0)
    identity_scale: float = option(0.5, "Weight lambda of the distance from the base model's weights.", above=0)

    def prompts(self, concepts: list[str]) -> list[str]:
        return [*super().prompts(concepts), *self._phrased(concepts)]

    def _phrased(self, concepts: list[str]) -> list[str]:
        return [form.format(concept) for concept in concepts for form in ("{}", *PHRASINGS[self.phrasings])]

    def erase(self, run: Run) -> None:
        texts, count = self._phrased(run.concepts), 1 + len(PHRASINGS[self.phrasings])
        names = [anchor for anchor in self.anchors(run.concepts) for _ in range(count)]
        kept = run.retained or ([NO_TEXT] if self.tokens == "tail" else [])
        encoded = EncodedPrompts(run, [*texts, *names, *kept])
        check_distinct(encoded.last(texts[::count]), encoded.last(names[::count]), run.concepts, names[::count])
        edit_text_projections(run, self.change(encoded, texts, names, kept), names[::count])

    def change(self, encoded: EncodedPrompts, texts: list[str], names: list[str], kept: list[str]) -> Any:
        """The edit that makes each text read as the anchor of the same place; `(d, d)`."""
        if self.tokens == "tail":
            erased, anchors = encoded.tails(texts, names)
            retained = encoded.all(kept)
        else:
            erased, anchors = encoded.last(texts), encoded.last(names)
            retained = encoded.last(kept) if kept else erased[:0]
        scales = self.erase_scale, self.retain_scale, self.identity_scale
        return least_squares_edit(erased, anchors, retained, *scales)
