"""The model card of a student, made of what lies in its folder: what is not known, it says."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..families.students import STUDENTS
from ..formats import INDEX, denoiser_folder
from ..loading import read_json_object
from ..provenance import STUDENT_FILE, Distillation
from ..report.grid import GRID_NAME
from .base import Base
from .cards import make_card
from .contents import published_record
from .model_index import model_index
from .sections import MOST_LISTED, base_link, code, facts_table, licence_text, listed, measured


def student_card(folder: str | Path, repo_id: str, base: Base) -> ModelCard:
    """The model card of a student, from what lies in its folder.

    Args:
        folder (`str` or `Path`): With `distillation.json` and the model.
        repo_id (`str`): Where it is or will be on the Hub.
        base (`Base`): Of [`find_base`]: the teacher.
    """
    folder = Path(folder)
    record = published_record(Distillation.load(folder), base)
    sections = [
        _what(record, repo_id, base),
        _pictures(folder),
        "## How to use it\n\n" + _usage(folder, repo_id),
        "## What was measured\n\n" + measured(folder, "How much of what its teacher draws was lost"),
        "## How it was made\n\n" + _how(record, base),
        _limits(record),
        "## Licence\n\n" + licence_text(base),
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "text-to-image", "knowledge-distillation", record.student, "diffusers-safe"],
        **model_index(folder, repo_id),
        **base.metadata,
    )
    return make_card(data, "\n\n".join(section for section in sections if section) + "\n")


def _what(record: Distillation, repo_id: str, base: Base) -> str:
    parameters, macs = record.parameters, record.macs
    kind = STUDENTS.get(record.student)
    missing = f" without some of its blocks ({code(record.student)}: {kind.description})" if kind else ""
    return (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"A smaller student of {base_link(base)}, a text-to-image model: its denoiser{missing}, taught by the whole "
        "one.\n\n"
        "| denoiser | parameters | multiply-accumulates a forward |\n|---|---|---|\n"
        f"| this student | {parameters['student']:,} | {macs['student'] / 1e9:,.4g} G |\n"
        f"| its teacher | {parameters['teacher']:,} | {macs['teacher'] / 1e9:,.4g} G |"
    )


def _pictures(folder: Path) -> str:
    if not (folder / GRID_NAME).is_file():
        return ""
    return (
        f"![The same prompts and seeds, teacher and student]({GRID_NAME})\n\n"
        "Each column is one prompt, drawn from the same noise by the teacher and by this student."
    )


def _usage(folder: Path, repo_id: str) -> str:
    if not (folder / INDEX).is_file():
        denoiser = denoiser_folder(folder)
        name, class_name = denoiser.name, read_json_object(denoiser / "config.json")["_class_name"]
        return (
            f"The denoiser alone, for the teacher's pipeline:\n\n```python\nfrom diffusers import {class_name}\n\n"
            f'{name} = {class_name}.from_pretrained("{repo_id}", subfolder="{name}")\n```'
        )
    name = json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"]
    return (
        "A stock diffusers pipeline; no other package is needed.\n\n"
        f"```python\nfrom diffusers import {name}\n\n"
        f'pipeline = {name}.from_pretrained("{repo_id}")\nimage = pipeline("a photo of a cat").images[0]\n```'
    )


def _how(record: Distillation, base: Base) -> str:
    revision = f", revision {code(record.revision)}" if record.revision else ""
    weights = {name: record.arguments.get(f"{name}_weight") for name in ("task", "output", "feature", "sdd")}
    dropped = ", ".join(f"{count:,} rows {reason}" for reason, count in record.data.get("dropped", {}).items())
    told = {
        "teacher": f"{base_link(base)}{revision}, fingerprint of its denoiser {code(record.teacher_fingerprint)}",
        "losses": "BK-SDM ([arXiv 2305.15798](https://arxiv.org/abs/2305.15798)): "
        + ", ".join(f"{name} x {weight:g}" for name, weight in weights.items() if weight),
        "at the end": ", ".join(f"{name} {value:.4g}" for name, value in record.losses.items()) or "not known",
        "data": code(record.arguments.get("dataset_name") or "a local folder") + (f"; {dropped}" if dropped else ""),
        "when": record.created,
        "with": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    arguments = {name: value for name, value in record.arguments.items() if value not in (None, "", [])}
    return facts_table(told, arguments)


def _limits(record: Distillation) -> str:
    lines = [
        "* A student draws less well than its teacher, and not the same pictures.",
        "* All limits and biases of its teacher are in it, and those of the pictures that it saw.",
    ]
    if (erasure := record.teacher_erasure) is not None:
        gone = listed([code(concept) for concept in erasure["concepts"]], MOST_LISTED)
        lines.append(
            f"* Its teacher was made to forget {gone}. Erasure is not a guarantee, and training on pictures can bring "
            f"back what was erased ([`{STUDENT_FILE}`]({STUDENT_FILE}) tells how both were done)."
        )
    return "## Limits\n\n" + "\n".join(lines)
