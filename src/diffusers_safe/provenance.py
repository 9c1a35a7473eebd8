"""Records of what was done to a model, which travel with every result: erasure.json and distillation.json."""

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from types import UnionType
from typing import ClassVar, get_origin

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from torch import nn

from .embedded import embedded_name, locate_model
from .files import write_text
from .loading import ModelError, read_json_object


FILE_NAME = "erasure.json"
STUDENT_FILE = "distillation.json"
# What a record says of an erasure that somebody else made and did not describe.
UNKNOWN = {
    "concepts": [],
    "method": "unknown",
    "train_method": "unknown",
    "arguments": {},
    "versions": {},
    "created": "unknown",
}
_LIBRARIES = ("diffusers-safe", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that can change a result."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def fingerprint(module: nn.Module) -> str:
    """A hash of all weights of a module, names and values; the same on every machine. 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class Provenance:
    """The record of one erasure.

    Attributes:
        base_model (`str`): Absolute path or Hub id of the model that was changed.
        base_fingerprint (`str`, *optional*): [`fingerprint`] of its denoiser before the change; `None` if unknown.
        concepts (`list[str]`): What was erased; empty if unknown.
        method (`str`): `"sdd"`, ..., or `"unknown"`.
        train_method (`str`): Which weights were trained, a name of `weights.TRAIN_METHODS`, or `"unknown"`.
        arguments (`dict`): Every argument of the run.
        revision (`str`, *optional*): Revision of the base model on the Hub.
        versions (`dict[str, str]`): Of the libraries.
        created (`str`): UTC time, ISO 8601.
        export (`dict`, *optional*): What `diffusers-safe export` made of it: `to`, and of a LoRA its rank and errors.
            `None` for what training wrote.
    """

    base_model: str
    base_fingerprint: str | None
    concepts: list[str]
    method: str
    train_method: str
    arguments: dict
    revision: str | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    export: dict | None = None

    file_name: ClassVar[str] = FILE_NAME

    def save(self, folder: str | Path) -> None:
        write_text(Path(folder) / FILE_NAME, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Provenance":
        """Reads a folder's erasure.json.

        Raises:
            `ValueError`: If there is none or it has other fields.
        """
        record = _load(cls, Path(folder) / FILE_NAME, "the folder holds no erased model")
        record.base_model = located(record.base_model, folder, record.arguments)
        return record


@dataclass
class Distillation:
    """The record of a student: distillation.json.

    Attributes:
        teacher (`str`): Absolute path or Hub id of the model that taught.
        teacher_fingerprint (`str`): [`fingerprint`] of its denoiser.
        student (`str`): What was built of it, a name of `students.STUDENTS`, or the student that was gone on from.
        parameters (`dict[str, int]`): Of the denoisers of `"student"` and `"teacher"`.
        macs (`dict[str, float]`): Multiply-accumulates of one forward of each, of one sample.
        arguments (`dict`): Every argument of the run.
        teacher_erasure (`dict`, *optional*): The erasure.json of a teacher that was erased.
        data (`dict`): `samples`, `dropped` and `unreadable`: how many, the former by reason.
        losses (`dict[str, float]`): The terms of the loss at the end, means of the last twentieth of the run.
        revision (`str`, *optional*): Revision of the teacher on the Hub.
        versions (`dict[str, str]`): Of the libraries.
        created (`str`): UTC time, ISO 8601.
    """

    teacher: str
    teacher_fingerprint: str
    student: str
    parameters: dict[str, int]
    macs: dict[str, float]
    arguments: dict
    teacher_erasure: dict | None = None
    data: dict = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    revision: str | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    file_name: ClassVar[str] = STUDENT_FILE

    @property
    def base_model(self) -> str:
        """The teacher."""
        return self.teacher

    def save(self, folder: str | Path) -> None:
        write_text(Path(folder) / STUDENT_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Distillation":
        """Reads a folder's distillation.json.

        Raises:
            `ValueError`: If there is none or it has other fields.
        """
        record = _load(cls, Path(folder) / STUDENT_FILE, "the folder holds no student")
        record.teacher = located(record.teacher, folder, record.arguments)
        return record


def load_record(folder: str | Path) -> Provenance | Distillation:
    """The record of what a folder holds, an erased model or a student.

    Raises:
        `ValueError`: If there is none or it has other fields.
    """
    return Distillation.load(folder) if (Path(folder) / STUDENT_FILE).is_file() else Provenance.load(folder)


def erasure_of(model: str, **hub_arguments) -> dict | None:
    """What a model was made to forget, as its erasure.json says, or, of a student, that of its teacher.

    `None` where no record says so, or it is out of reach.

    Args:
        model (`str`): Folder or Hub id.
        hub_arguments: Of `hf_hub_download`, such as `revision`.
    """
    for name in (FILE_NAME, STUDENT_FILE):
        path = Path(locate_model(model)) / name
        if not path.parent.is_dir():
            try:
                path = Path(hf_hub_download(model, name, **hub_arguments))
            except (OSError, ValueError, HTTPError):  # no such file, or no Hub
                continue
        if path.is_file():
            record = (Provenance if name == FILE_NAME else Distillation).load(path.parent)
            return asdict(record) if name == FILE_NAME else record.teacher_erasure
    return None


def stored_path(model: str) -> str:
    """A model as a record names it: a folder by its absolute path, which is found from anywhere; an embedded model by
    its name; a Hub id as it is."""
    if not os.path.exists(model):
        return model
    return embedded_name(model) or os.path.abspath(model)


def located(model: str | None, folder: str | Path, arguments: dict | None = None) -> str | None:
    """A model that a record names, from where the record lies.

    Earlier versions recorded folders relative to where the run was started. That is known again if the record still
    lies where the run's `output_dir` was.

    Args:
        model (`str`, *optional*): Folder or Hub id.
        folder (`str` or `Path`): With the record.
        arguments (`dict`, *optional*): Of the run, as recorded.

    Returns:
        `str`: The path of the folder, or `model` where there is no such folder.
    """
    if not isinstance(model, str) or not model or os.path.isabs(model):
        return model
    folder = Path(os.path.abspath(folder))
    output = arguments.get("output_dir") if isinstance(arguments, dict) else None
    parts = Path(output).parts if isinstance(output, str) and not os.path.isabs(output) else ()
    started = folder.parents[len(parts) - 1] if parts and folder.parts[-len(parts) :] == parts else folder
    return next((str(place / model) for place in (folder, started) if os.path.exists(place / model)), model)


def _load(kind: type, path: Path, otherwise: str):
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {otherwise}")
    try:
        record = kind(**read_json_object(path))
    except TypeError as error:
        raise ModelError(f"{path}: not a record of ours ({error})") from None
    for item in fields(kind):
        value = getattr(record, item.name)
        allowed = item.type if isinstance(item.type, UnionType) else get_origin(item.type) or item.type
        if not isinstance(value, allowed):
            raise ModelError(f"{path}: not a record of ours ({item.name} is a {type(value).__name__})")
    return record
