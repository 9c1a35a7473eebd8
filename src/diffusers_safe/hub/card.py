"""The model card of an erased model, made of what lies in its folder: what is not known, it says."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..formats import INDEX, LORA_NAME, PARTIAL_NAME, UNET_FOLDER
from ..methods import METHODS
from ..provenance import FILE_NAME, Provenance
from ..report.grid import GRID_NAME
from ..weights.trained import TRAIN_METHODS
from .base import Base
from .cards import make_card
from .contents import published_record
from .model_index import model_index
from .sections import MOST_LISTED, base_link, code, facts_table, licence_text, measured


def erasure_card(folder: str | Path, repo_id: str, base: Base) -> ModelCard:
    """The model card of an erased model, from what lies in its folder.

    Args:
        folder (`str` or `Path`): With `erasure.json` and the model.
        repo_id (`str`): Where it is or will be on the Hub.
        base (`Base`): Of [`find_base`].
    """
    folder = Path(folder)
    provenance = published_record(Provenance.load(folder), base)
    sections = [
        _what(folder, provenance, repo_id, base),
        _pictures(folder),
        "## How to use it\n\n" + _usage(folder, provenance, repo_id, base),
        "## What was measured\n\n"
        + measured(folder, "Whether the concepts are gone, and what else was lost with them,"),
        "## How it was made\n\n" + _how(provenance, base),
        _LIMITS,
        "## Licence\n\n" + licence_text(base),
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "text-to-image", "concept-erasure", provenance.method, "diffusers-safe"],
        **model_index(folder, repo_id),
        **base.metadata,
    )
    return make_card(data, "\n\n".join(section for section in sections if section) + "\n")


def _what(folder: Path, provenance: Provenance, repo_id: str, base: Base) -> str:
    concepts = [f"* {code(concept)}" for concept in provenance.concepts[:MOST_LISTED]]
    if more := len(provenance.concepts) - MOST_LISTED:
        concepts += [f"* and {more} more, which [`{FILE_NAME}`]({FILE_NAME}) names"] if more > 0 else []
    whole = " Nothing else has to be switched on when it is used." if (folder / INDEX).is_file() else ""
    source = provenance.arguments.get("erase_from")
    only = f" They were erased from what {code(source)} says; other prompts were left alone." if source else ""
    by = provenance.method.upper()
    if (method := METHODS.get(provenance.method)) is not None:
        link = f"[arXiv {method.paper}](https://arxiv.org/abs/{method.paper})"
        by = f"{by} ({method.title}, {method.authors}, {link})"
    return (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"{base_link(base)}, a text-to-image model, after training to forget:\n\n" + "\n".join(concepts) + "\n\n"
        f"Its weights were changed by {by}.{whole}{only}"
    )


def _pictures(folder: Path) -> str:
    if not (folder / GRID_NAME).is_file():
        return ""
    return (
        f"![The same prompts and seeds before and after the erasure]({GRID_NAME})\n\n"
        "Each column is one prompt, drawn from the same noise by the base model (before) and by this model (after)."
    )


def _usage(folder: Path, provenance: Provenance, repo_id: str, base: Base) -> str:
    of_base = f'"{base.name}"' if base.on_hub else '"path/to/the/base/model"'
    for name, value in {"revision": provenance.revision, "variant": provenance.arguments.get("variant")}.items():
        of_base += f', {name}="{value}"' if value else ""
    ways = []
    if (folder / INDEX).is_file():
        name = json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"]
        ways.append(
            "A stock diffusers pipeline; no other package is needed.\n\n"
            f"```python\nfrom diffusers import {name}\n\n"
            f'pipeline = {name}.from_pretrained("{repo_id}")\nimage = pipeline("a photo of a cat").images[0]\n```'
        )
    elif (folder / UNET_FOLDER / "config.json").is_file():
        ways.append(
            "The UNet alone, for the base model's pipeline:\n\n"
            "```python\nfrom diffusers import DiffusionPipeline, UNet2DConditionModel\n\n"
            f'unet = UNet2DConditionModel.from_pretrained("{repo_id}", subfolder="{UNET_FOLDER}")\n'
            f"pipeline = DiffusionPipeline.from_pretrained({of_base}, unet=unet)\n```"
        )
    if (folder / LORA_NAME).is_file():
        ways.append(
            f"A LoRA, for the base model and no other{_approximation(provenance)}:\n\n"
            "```python\nfrom diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({of_base})\n"
            f'pipeline.load_lora_weights("{repo_id}")\n```'
        )
    if (folder / PARTIAL_NAME).is_file():
        ways.append(
            f"`{PARTIAL_NAME}` holds only the weights that were trained. They go into the base model, and no other: "
            "the package `diffusers-safe` checks that.\n\n"
            "```python\nfrom diffusers import DiffusionPipeline\nfrom diffusers_safe.formats import load_partial\n"
            "from huggingface_hub import hf_hub_download\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({of_base})\n"
            f'load_partial(pipeline.unet, hf_hub_download("{repo_id}", "{PARTIAL_NAME}"))\n```'
        )
    return "\n\n".join(ways)


def _how(provenance: Provenance, base: Base) -> str:
    revision = f", revision {code(provenance.revision)}" if provenance.revision else ""
    method = TRAIN_METHODS.get(provenance.train_method)
    told = {
        "base model": f"{base_link(base)}{revision}, fingerprint of its denoiser `{provenance.base_fingerprint}`",
        "method": f"`{provenance.method}`",
        "trained weights": f"`{provenance.train_method}`" + (f": {method.description}" if method else ""),
        **_low_rank(provenance),
        "when": provenance.created,
        "with": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
    }
    arguments = {
        name: value
        for name, value in provenance.arguments.items()
        if name not in ("concepts", "train_method") and value not in (None, "", [])
    }
    return facts_table(told, arguments)


def _approximation(provenance: Provenance) -> str:
    return "; how close it comes to the erased model is told below" if _low_rank(provenance) else ""


def _low_rank(provenance: Provenance) -> dict[str, str]:
    """What `diffusers-safe export` lost on the way to a LoRA; a LoRA that was trained is the erasure itself."""
    export = provenance.export or {}
    if export.get("to") != "lora":
        return {}
    worst = export["worst"]
    told = (
        f"rank {export['rank']}, made from the erased weights: off by {export['error']:.2%} of what the erasure "
        f"changed (relative Frobenius error), at worst {worst['error']:.2%} ({code(worst['parameter'])})"
    )
    if lost := export["left_out"]:
        told += f"; {len(lost)} changed biases and norms are left out, such as {code(lost[0])}"
    return {"LoRA": told}


_LIMITS = """## Limits

**Erasure is not a guarantee.**

* Other words for the same thing, other languages, embeddings, input images or fine-tuning can bring a concept back.
* Training to forget changes other pictures, too, mostly of what is close to the concepts.
* The base model still has the concepts, and whoever has it needs no way around.
* All other limits and biases of the base model are in this one.

Use it as one layer of several, and look at what it draws in your own use before you rely on it."""
