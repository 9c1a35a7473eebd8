"""Where an erased model is: on this disk, or on the Hub."""

import os
from pathlib import Path

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..embedded import locate_model
from ..families import denoiser_names
from ..model_errors import reason
from ..provenance import FILE_NAME
from .folders import INDEX
from .read import only_weight_file
from .write import KOHYA_NAME, LORA_NAME, PARTIAL_NAME


RECORDS = [INDEX, FILE_NAME]
_FILES = (PARTIAL_NAME, LORA_NAME, KOHYA_NAME, "config.json")


def fetch(source: str | Path, weight_name: str | None = None, only_records: bool = False, **hub_arguments) -> Path:
    """The local path of an erased model: itself, or what the Hub's cache holds of a repository.

    Of a repository only what can hold an erasure is downloaded: indices, `erasure.json`, a partial file, a LoRA, a
    denoiser. A file of another name is downloaded if it is the only one or `weight_name` asks for it.

    Args:
        source (`str` or `Path`): A file, a folder or a Hub id.
        weight_name (`str`, *optional*): One file of the folder or repository.
        only_records (`bool`, defaults to `False`): Of a repository, download only `model_index.json` and
            `erasure.json`.
        hub_arguments: Some of `HUB_ARGUMENTS`.

    Raises:
        `ValueError`: If there is nothing, or several files of other names.
    """
    if not str(source).strip():
        raise ValueError("source: is empty; give a file, a folder or a Hub id")
    path = Path(locate_model(source))
    if os.path.exists(path):
        path = path / weight_name if weight_name else path
        if not os.path.exists(path):
            raise ValueError(f"{path}: no such file")
        return path
    try:
        if weight_name:
            return Path(hf_hub_download(str(source), weight_name, **hub_arguments))
        folders = [f"{name}/*.{ending}" for name in denoiser_names() for ending in ("json", "safetensors")]
        erasures = [*RECORDS, *_FILES, *folders, "diffusion_pytorch_model*"]
        patterns = RECORDS if only_records else erasures
        folder = Path(snapshot_download(str(source), allow_patterns=patterns, **hub_arguments))
        if only_records or any((folder / name).exists() for name in (INDEX, *_FILES, *denoiser_names())):
            return folder
        hub = {name: hub_arguments[name] for name in ("revision", "token") if name in hub_arguments}
        name = only_weight_file(list_repo_files(str(source), **hub), str(source))
        return Path(hf_hub_download(str(source), name, **hub_arguments))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        named = f" with a file {weight_name}" if weight_name else ""
        raise ValueError(f"'{source}': no such file, folder or Hub repository{named} ({reason(error)})") from None
