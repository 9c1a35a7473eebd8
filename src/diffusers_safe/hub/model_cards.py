"""The model cards of erased models and of students, made from the files in their folders. What is unknown is named."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from ..families import TRAIN_METHODS, families, family_of_names
from ..families.students import STUDENTS
from ..formats import CHECKPOINT_NAME, INDEX, KOHYA_NAME, LORA_NAME, PARTIAL_NAME, denoiser_folder
from ..methods import METHODS
from ..model_files import read_json_object
from ..provenance import Distillation, Provenance
from ..report.grid import GRID_NAME
from ..report.results import headline_table
from .base import Base
from .cards import make_card
from .contents import evaluation_files, find_results, published_record, read_results
from .model_index import model_index


MOST_LISTED = 30  # names on a card; the record next to it has all of them


def erasure_card(folder: str | Path, repo_id: str, base: Base) -> ModelCard:
    """The model card of an erased model.

    Args:
        folder (`str` or `Path`): Folder with `erasure.json` and the model.
        repo_id (`str`): Where it is or will be on the Hub.
        base (`Base`): The base model, from [`find_base`].
    """
    folder = Path(folder)
    record = published_record(Provenance.load(folder), base)
    of_base = f'"{base.name}"' if base.on_hub else '"path/to/the/base/model"'
    for name, value in {"revision": record.revision, "variant": record.arguments.get("variant")}.items():
        of_base += f', {name}="{value}"' if value else ""
    low_rank = _low_rank(record)
    trained = TRAIN_METHODS.get(record.train_method)
    facts = {
        "base model": f"{_based_on(base, record.revision)}, fingerprint of its denoiser `{record.base_fingerprint}`",
        "method": f"`{record.method}`",
        "trained weights": f"`{record.train_method}`" + (f": {trained.description}" if trained else ""),
        **({"LoRA": low_rank} if low_rank else {}),
    }
    return _card(
        "erasure_card.md", folder, repo_id, base, record, facts, {"concepts", "train_method"},
        ["concept-erasure", record.method],
        method=METHODS.get(record.method),
        of_base=of_base,
        low_rank=low_rank,
        has_pipeline=(folder / INDEX).is_file(),
        has_lora=(folder / LORA_NAME).is_file(),
        kohya=KOHYA_NAME if (folder / KOHYA_NAME).is_file() else None,
        in_a1111=_is_listed_by_a1111(folder / KOHYA_NAME),
        checkpoint=CHECKPOINT_NAME if (folder / CHECKPOINT_NAME).is_file() else None,
        has_partial=(folder / PARTIAL_NAME).is_file(),
        partial_name=PARTIAL_NAME,
        partial_of=_partial_of(folder / PARTIAL_NAME),
    )  # fmt: skip


def student_card(folder: str | Path, repo_id: str, base: Base) -> ModelCard:
    """The model card of a student.

    Args:
        folder (`str` or `Path`): Folder with `distillation.json` and the model.
        repo_id (`str`): Where it is or will be on the Hub.
        base (`Base`): The teacher, from [`find_base`].
    """
    folder = Path(folder)
    record = published_record(Distillation.load(folder), base)
    weights = {name: record.arguments.get(f"{name}_weight") for name in ("task", "output", "feature", "sdd")}
    dropped = ", ".join(f"{count:,} rows {reason}" for reason, count in record.data.get("dropped", {}).items())
    fingerprint = code(record.teacher_fingerprint)
    facts = {
        "teacher": f"{_based_on(base, record.revision)}, fingerprint of its denoiser {fingerprint}",
        "losses": "BK-SDM ([arXiv 2305.15798](https://arxiv.org/abs/2305.15798)): "
        + ", ".join(f"{name} x {weight:g}" for name, weight in weights.items() if weight),
        "at the end": ", ".join(f"{name} {value:.4g}" for name, value in record.losses.items()) or "unknown",
        "data": code(record.arguments.get("dataset_name") or "a local folder") + (f"; {dropped}" if dropped else ""),
    }
    erased = [code(concept) for concept in (record.teacher_erasure or {}).get("concepts", [])]
    return _card(
        "student_card.md", folder, repo_id, base, record, facts, set(), ["knowledge-distillation", record.student],
        kind=STUDENTS.get(record.student),
        erased=listed(erased, MOST_LISTED),
    )  # fmt: skip


def _card(
    template: str,
    folder: Path,
    repo_id: str,
    base: Base,
    record: Provenance | Distillation,
    facts: dict[str, str],
    left_out: set[str],
    tags: list[str],
    **values: Any,
) -> ModelCard:
    """Renders a card: `facts` become the table of how the model was made, arguments of the run that are `left_out`
    of it or empty are dropped."""
    facts["when"] = record.created
    facts["with"] = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    index = folder / INDEX
    text = _environment.get_template(template).render(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        base=base,
        record=record,
        record_file=record.file_name,
        pipeline_class=json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.is_file() else None,
        denoiser=_denoiser(folder),
        picture=GRID_NAME if (folder / GRID_NAME).is_file() else None,
        evaluation=_evaluation(folder),
        facts=facts,
        arguments={
            name: value
            for name, value in record.arguments.items()
            if name not in left_out and value not in (None, "", [])
        },
        most_listed=MOST_LISTED,
        **values,
    )
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "text-to-image", *tags, "diffusers-safe"],
        **model_index(folder, repo_id),
        **base.metadata,
    )
    return make_card(data, text)


def _denoiser(folder: Path) -> dict[str, str] | None:
    """Name and class of the denoiser in a folder."""
    if (denoiser := denoiser_folder(folder)) is None:
        return None
    return {"name": denoiser.name, "class_name": read_json_object(denoiser / "config.json")["_class_name"]}


def _partial_of(path: Path) -> str | None:
    """The name of the denoiser that a file of erased weights is for."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return (family_of_names(file.keys()) or families()[0]).denoiser_name


def _is_listed_by_a1111(path: Path) -> bool:
    """Whether a LoRA is of a model that A1111 knows, see [`~ModelFamily.kohya_metadata`]."""
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return any(name.startswith("ss_") for name in file.metadata() or {})


def _evaluation(folder: Path) -> dict | None:
    """The headline table of the evaluation in a folder, and links to its files."""
    path = find_results(folder)
    if path is None:
        return None
    results = read_results(path)
    return {
        "table": headline_table(results) if "headline" in results else "",
        "links": [f"[{file.name}]({file.relative_to(folder).as_posix()})" for file in evaluation_files(folder)],
    }


def _low_rank(record: Provenance) -> str:
    """What `diffusers-safe export` lost when it made a LoRA. A LoRA that was trained is the erasure itself."""
    export = record.export or {}
    if "rank" not in export:
        return ""
    worst = export["worst"]
    text = (
        f"rank {export['rank']}, made from the erased weights: off by {export['error']:.2%} of what the erasure "
        f"changed (relative Frobenius error), at worst {worst['error']:.2%} ({code(worst['parameter'])})"
    )
    if lost := export["left_out"]:
        part = f" ({export['lost']:.2%} of the change)" if "lost" in export else ""
        text += f"; {len(lost)} changed biases and norms are left out{part}, such as {code(lost[0])}"
    return text


# --- Markdown --------------------------------------------------------------------------------------------------------


def _based_on(base: Base, revision: str | None) -> str:
    name = f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else code(base.name)
    return f"{name}, revision {code(revision)}" if revision else name


def listed(names: list[str], most: int) -> str:
    """Names in one line; of many the first ones and how many more there are."""
    shown = " ".join(", ".join(names[:most]).split())
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def code(text: str) -> str:
    """Text as inline code, which Markdown does not interpret."""
    text = " ".join(text.split())
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (text.count("`") + 1)
    return f"{fence} {text} {fence}"


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def _argument(value: Any) -> str:
    return listed([str(item) for item in value], MOST_LISTED) if isinstance(value, list) else str(value)


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=False,  # Markdown, with names of people's files and concepts as code
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.filters |= {"argument": _argument, "cell": _cell, "code": code}
