"""CLIP score: how well an image matches its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from ..images import to_rgb
from ..provenance import fingerprint
from .base import Metric, Quantity
from .loading import chosen, load_pretrained, on_device


@dataclass(frozen=True)
class ClipProtocol:
    """A variant of the CLIP score.

    Attributes:
        model (`str`): Folder or Hub id of a CLIP model.
        prefix (`str`): Text before every prompt.
        scale (`float`): Factor of the cosine.
        clamp (`bool`): Whether negative cosines count as 0.
    """

    model: str
    prefix: str
    scale: float
    clamp: bool


PRESETS = {
    "sdd": ClipProtocol("openai/clip-vit-large-patch14", "A photo depicts ", 1.0, False),
    "hessel": ClipProtocol("openai/clip-vit-base-patch32", "A photo depicts ", 2.5, True),
    "torchmetrics": ClipProtocol("openai/clip-vit-large-patch14", "", 100.0, True),
}


class CLIPScore(Metric):
    """`scale * cosine(image, prefix + prompt)`, averaged over images.

    A text that exceeds the model's length (77 tokens with start and end) is truncated; `details` counts these.

    Args:
        preset (`str`, defaults to `"sdd"`): `"sdd"`: ViT-L/14, "A photo depicts ", the cosine itself. `"hessel"`, as
            in the paper: ViT-B/32, the same prefix, 2.5 times the cosine, at least 0. `"torchmetrics"`: ViT-L/14, no
            prefix, 100 times the cosine (torchmetrics clamps the average at 0, this metric each image).
        model (`str`, *optional*): Folder or Hub id of another CLIP model.

    Raises:
        `ValueError`: If the preset is unknown or the model cannot be loaded.

    Source: J. Hessel et al., CLIPScore: a reference-free evaluation metric for image captioning, EMNLP 2021.
    """

    name = "clip_score"
    quantities = {"clip_score": Quantity("CLIP score", better="higher")}

    def __init__(self, preset: str = "sdd", model: str | None = None):
        super().__init__()
        self.preset, self.protocol = preset, chosen(PRESETS, preset, "clip_preset")
        name = model or self.protocol.model
        what = f"a CLIP such as {self.protocol.model}"
        self.model = load_pretrained(CLIPModel, name, "clip_model", what)
        self.processor = load_pretrained(AutoImageProcessor, name, "clip_model", what, backend="pil")
        self.tokenizer = load_pretrained(AutoTokenizer, name, "clip_model", what)
        self.max_tokens = self.model.config.text_config.max_position_embeddings

    def identity(self) -> dict:
        return {
            "metric": self.name,
            "model": fingerprint(self.model),
            "processor": self.processor.to_dict(),
            "prefix": self.protocol.prefix,
        }

    @torch.inference_mode()
    def score(
        self, images: Sequence[Image.Image], rows: Sequence[dict], originals: Sequence[Image.Image] | None = None
    ) -> list[dict]:
        device = on_device(self.model)
        texts = [self.protocol.prefix + row["prompt"] for row in rows]
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(device)
        pixels = self.processor(images=list(map(to_rgb, images)), return_tensors="pt")["pixel_values"].to(device)
        output = self.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
        )
        cosines = functional.cosine_similarity(output.image_embeds, output.text_embeds, dim=-1).tolist()
        return [{"cosine": cosine, "tokens": len(ids)} for cosine, ids in zip(cosines, whole)]

    def values(self, row: dict, score: dict) -> dict[str, float]:
        cosine = max(score["cosine"], 0.0) if self.protocol.clamp else score["cosine"]
        return {"clip_score": self.protocol.scale * cosine}

    def details(self) -> dict:
        """`preset`, `prefix` and `scale` of the protocol, and `truncated`: number of images with a truncated text."""
        truncated = sum(score["tokens"] > self.max_tokens for score in self.scores)
        protocol = self.protocol
        return {"preset": self.preset, "prefix": protocol.prefix, "scale": protocol.scale, "truncated": truncated}
