"""Loads the libraries, weights and models of metrics. If something is missing, a `ValueError` says what to get."""

import hashlib
import importlib
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..loading import without_progress_bars


IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def import_library(name: str, why: str, licence: str) -> ModuleType:
    """Imports an optional library.

    Args:
        name (`str`): Name of its module.
        why (`str`): What needs it.
        licence (`str`): What to know about its licence before installing it.

    Raises:
        `ValueError`: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{why}: needs {name} ({error}); pip install '.[eval]' in the repository of diffusers_safe ({licence})"
        ) from None


def checked_file(path: str | Path | None, option: str, what: str) -> Path:
    """The path of a file that a metric needs.

    Args:
        path (`str` or `Path`, *optional*): The given path.
        option (`str`): The option that gives it.
        what (`str`): What the file is and where to get it.

    Raises:
        `ValueError`: If no path is given or there is no file.
    """
    if path is None:
        raise ValueError(f"{option}: none given; download {what}, and give its path")
    if not Path(path).is_file():
        raise ValueError(f"{option} {path}: no such file; download {what}")
    return Path(path)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict from a `.safetensors` file or from a pickle that holds only tensors.

    Raises:
        `ValueError`: If the file holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error) or "cut off").strip().split("\n")[0]
        raise ValueError(f"{path}: not a file of weights ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state dict of tensors")
    return state


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], path: Path, what: str) -> None:
    """Loads a state dict into a module, with exactly its names and shapes. The module is then frozen, in eval mode.

    Args:
        module (`nn.Module`): The module.
        state (`dict[str, torch.Tensor]`): From [`read_state`].
        path (`Path`): File of the state dict.
        what (`str`): What it should be, for the message.

    Raises:
        `ValueError`: If a name is missing or unexpected, or a shape differs.
    """
    expected = module.state_dict()
    # Files older than PyTorch 0.4.1 have no counts of batches.
    state = {name: expected[name] for name in expected if name.endswith("num_batches_tracked")} | state
    missing, strange = expected.keys() - state.keys(), state.keys() - expected.keys()
    wrong = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    for names, reason in ((missing, "lacks"), (strange, "has too much:"), (wrong, "has another shape of")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{path}: not {what}; it {reason} {min(names)}{more}")
    module.load_state_dict(state)
    module.eval().requires_grad_(False)


def load_pretrained(kind: type, name: str, option: str, what: str, **arguments):
    """Loads a model, processor or tokenizer of transformers. Models are in float32 and eval mode.

    Args:
        kind (`type`): The class, with `from_pretrained`.
        name (`str`): Folder or Hub id.
        option (`str`): The option that gives it.
        what (`str`): What it must be, for the message.
        arguments: Arguments of `from_pretrained`.

    Raises:
        `ValueError`: If it cannot be loaded, or a model lacks weights.
    """
    is_model = hasattr(kind, "config_class") or hasattr(kind, "_model_mapping")
    try:
        if not is_model:
            return kind.from_pretrained(name, **arguments)
        with without_progress_bars():
            model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{option} '{name}': cannot be loaded; give {what}: a local folder, or a Hub id if the Hub can be reached "
            f"({reason})"
        ) from None
    if info["missing_keys"]:
        raise ValueError(f"{option} '{name}': is not {what}; it lacks weights such as {min(info['missing_keys'])}")
    return model.eval().requires_grad_(False)


def on_device(module: nn.Module) -> torch.device:
    """Moves a module to the device of this process, and returns the device."""
    device = PartialState().device
    module.to(device)
    return device


def alike(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batches tensors of the same shape, with their indices."""
    shapes = dict.fromkeys(tuple(tensor.shape) for tensor in tensors)
    for shape in shapes:
        places = [place for place, tensor in enumerate(tensors) if tuple(tensor.shape) == shape]
        yield places, torch.stack([tensors[place] for place in places])


def image_files(folder: str | Path, option: str) -> list[Path]:
    """The images of a folder and its subfolders, by name.

    Raises:
        `ValueError`: If there is no folder, or it holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise ValueError(f"{option} {folder}: holds no images ({', '.join(IMAGE_ENDINGS)})")
    return files


def digest(data: bytes) -> str:
    """A hash of bytes, 16 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:16]


def chosen(table: dict, name: str, option: str):
    """The entry of a table.

    Raises:
        `ValueError`: If there is no such entry.
    """
    if name not in table:
        raise ValueError(f"{option} '{name}': unknown; allowed are {', '.join(table)}")
    return table[name]
