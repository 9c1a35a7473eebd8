"""Pictures, rows and small models of the real architectures that several tests of metrics share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from diffusers_safe.emoji.architecture import MAX_TOKENS, build_tokenizer
from diffusers_safe.generation.manifest import save_png
from diffusers_safe.metrics.trunks import Trunk


WIDTH = 24  # of a tiny CLIP's embeddings


def nudenet():
    """The module of NudeNet's detector, which the extra `dev` leaves out; the test is skipped without it."""
    return pytest.importorskip("nudenet.nudenet", reason="NudeNet (AGPL-3.0) is not installed: pip install '.[eval]'")


def pictures(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> list[Image.Image]:
    """RGB noise of (width, height)."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def rows_of(count: int, prompts: list[str] | None = None, labels: list[dict] | None = None) -> list[dict]:
    return [
        {
            "id": str(i),
            "prompt": prompts[i] if prompts else f"prompt {i}",
            "seed": i,
            "labels": labels[i] if labels else {},
        }
        for i in range(count)
    ]


def generated_folder(folder: Path, images: list[Image.Image], prompts: list[str] | None = None) -> list[dict]:
    """Images and their rows, as `generate` would leave them, without the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(len(images), prompts)
    return [row | save_png(folder, f"{row['id']}.png", image) for row, image in zip(rows, images)]


def save_tiny_clip(folder: Path) -> Path:
    """A CLIP that sees 32 x 32 pixels, with its processor and tokenizer."""
    tokenizer = build_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **size,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**size, "image_size": 32, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_resnet(folder: Path, classes: list[str]) -> Path:
    """A ResNet classifier with its processor."""
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetForImageClassification(config)
        torch.nn.init.normal_(model.classifier[1].weight)
    model.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def save_trunk(path: Path, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, with some of its classifier; what was saved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Trunk(kind).state_dict().items()}
    state = {
        name: torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        if len(shape) > 1
        else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    state["classifier.6.bias"] = torch.zeros(1000)
    torch.save(state, path)
    return state
