"""Records of how a model was made, which are saved with every result: erasure.json and distillation.json."""

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from types import UnionType
from typing import ClassVar, TypeVar, get_args, get_origin

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from torch import nn

from .embedded import embedded_name, locate_model
from .files import write_text
from .model_errors import ModelError
from .model_files import read_json_object


FILE_NAME = "erasure.json"
STUDENT_FILE = "distillation.json"
# The fields of a record for an erasure by another program that wrote no record.
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
    """The installed versions of the libraries that can change a result. The value is `"not installed"` if missing."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def fingerprint(module: nn.Module) -> str:
    """A hash of the names and values of all weights of a module, 16 hexadecimal digits. Equal on every machine."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


R = TypeVar("R", bound="_Record")


class _Record:
    """A dataclass that is saved as a JSON file in the folder of a result."""

    file_name: ClassVar[str]
    _base_field: ClassVar[str]  # the field that names the model from which the result was made
    _if_missing: ClassVar[str]  # the end of the message if there is no file

    def save(self, folder: str | Path) -> None:
        """Writes the record to a folder."""
        write_text(Path(folder) / self.file_name, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls: type[R], folder: str | Path) -> R:
        """Reads the record of a folder.

        Raises:
            `ValueError`: If there is no record, or its fields are invalid.
        """
        path = Path(folder) / cls.file_name
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {cls._if_missing}")
        try:
            record = cls(**read_json_object(path))
        except TypeError as error:
            raise ModelError(f"{path}: not a valid record ({error})") from None
        for item in fields(cls):
            value = getattr(record, item.name)
            allowed = item.type if isinstance(item.type, UnionType) else get_origin(item.type) or item.type
            if not isinstance(value, allowed):
                raise ModelError(f"{path}: not a valid record ({item.name} is a {type(value).__name__})")
            inner = get_args(item.type)[-1] if get_origin(item.type) in (list, dict) else object
            for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
                if not isinstance(entry, (int, float) if inner is float else inner):
                    raise ModelError(f"{path}: not a valid record ({item.name} has a {type(entry).__name__})")
        if not (base := getattr(record, cls._base_field)).strip():
            raise ModelError(f"{path}: not a valid record ({cls._base_field} is empty)")
        setattr(record, cls._base_field, located(base, folder, record.arguments))
        return record


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class Provenance(_Record):
    """The record of an erasure: erasure.json.

    Args:
        base_model (`str`): Absolute path or Hub id of the model before the erasure.
        base_fingerprint (`str`, *optional*): [`fingerprint`] of its denoiser; `None` if unknown.
        concepts (`list[str]`): Erased concepts; empty if unknown.
        method (`str`): Name of the method, such as `"sdd"`, or `"unknown"`.
        train_method (`str`): Selection of trained weights, a name of `weights.TRAIN_METHODS`, or `"unknown"`.
        arguments (`dict`): All arguments of the run.
        revision (`str`, *optional*): Revision of the base model on the Hub.
        versions (`dict[str, str]`, *optional*): Versions of the libraries; those of [`library_versions`] by default.
        created (`str`, *optional*): UTC time in ISO 8601; now by default.
        export (`dict`, *optional*): Arguments and results of `diffusers-safe export`: `to`, and for a LoRA its rank
            and errors. `None` for the output of a training run.
    """

    base_model: str
    base_fingerprint: str | None
    concepts: list[str]
    method: str
    train_method: str
    arguments: dict
    revision: str | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    created: str = field(default_factory=_now)
    export: dict | None = None

    file_name: ClassVar[str] = FILE_NAME
    _base_field: ClassVar[str] = "base_model"
    _if_missing: ClassVar[str] = "the folder holds no erased model"


@dataclass
class Distillation(_Record):
    """The record of a student: distillation.json.

    Args:
        teacher (`str`): Absolute path or Hub id of the teacher.
        teacher_fingerprint (`str`): [`fingerprint`] of its denoiser.
        student (`str`): Name of the student in `students.STUDENTS`, or the student from which training continued.
        parameters (`dict[str, int]`): Number of parameters of the denoisers of `"student"` and `"teacher"`.
        macs (`dict[str, float]`): Multiply-accumulates of a forward pass of each for one sample.
        arguments (`dict`): All arguments of the run.
        teacher_erasure (`dict`, *optional*): The erasure.json of the teacher, if it was erased.
        data (`dict`, *optional*): Numbers of `samples`, of `dropped` rows by reason, and of `unreadable` images.
        losses (`dict[str, float]`, *optional*): Mean of each term of the loss over the last twentieth of the run.
        revision (`str`, *optional*): Revision of the teacher on the Hub.
        versions (`dict[str, str]`, *optional*): Versions of the libraries; those of [`library_versions`] by default.
        created (`str`, *optional*): UTC time in ISO 8601; now by default.
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
    created: str = field(default_factory=_now)

    file_name: ClassVar[str] = STUDENT_FILE
    _base_field: ClassVar[str] = "teacher"
    _if_missing: ClassVar[str] = "the folder holds no student"

    @property
    def base_model(self) -> str:
        """The teacher."""
        return self.teacher


def load_record(folder: str | Path) -> Provenance | Distillation:
    """Reads the record of an erased model or a student.

    Raises:
        `ValueError`: If there is no record, or its fields are invalid.
    """
    return Distillation.load(folder) if (Path(folder) / STUDENT_FILE).is_file() else Provenance.load(folder)


def erasure_of(model: str, **hub_arguments) -> dict | None:
    """The erasure.json of a model or, for a student, of its teacher.

    Args:
        model (`str`): Folder or Hub id.
        hub_arguments: Arguments of `hf_hub_download`, such as `revision`.

    Returns:
        `dict`: The record, or `None` if there is no record or the Hub cannot be reached.
    """
    for name in (FILE_NAME, STUDENT_FILE):
        path = Path(locate_model(model)) / name
        if not path.parent.is_dir():
            try:
                path = Path(hf_hub_download(model, name, **hub_arguments))
            except (OSError, ValueError, HTTPError):  # no such file, or the Hub cannot be reached
                continue
        if path.is_file():
            record = (Provenance if name == FILE_NAME else Distillation).load(path.parent)
            return asdict(record) if name == FILE_NAME else record.teacher_erasure
    return None


def stored_path(model: str) -> str:
    """The name of a model in a record: the absolute path of a folder, the name of an embedded model, or a Hub id."""
    if not os.path.exists(model):
        return model
    return embedded_name(model) or os.path.abspath(model)


def located(model: str | None, folder: str | Path, arguments: dict | None = None) -> str | None:
    """Resolves the model that a record names.

    Earlier versions stored paths relative to the working directory of the run. It can be derived if the record still
    lies in the run's `output_dir`.

    Args:
        model (`str`, *optional*): Folder or Hub id.
        folder (`str` or `Path`): Folder of the record.
        arguments (`dict`, *optional*): Recorded arguments of the run.

    Returns:
        `str`: The path of the folder, or `model` if no such folder exists.
    """
    if not isinstance(model, str) or not model or os.path.isabs(model):
        return model
    folder = Path(os.path.abspath(folder))
    output = arguments.get("output_dir") if isinstance(arguments, dict) else None
    parts = Path(output).parts if isinstance(output, str) and not os.path.isabs(output) else ()
    started = folder.parents[len(parts) - 1] if parts and folder.parts[-len(parts) :] == parts else folder
    return next((str(place / model) for place in (folder, started) if os.path.exists(place / model)), model)
