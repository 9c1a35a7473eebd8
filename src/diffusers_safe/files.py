"""Writing files atomically, with the permissions of the umask, and reading JSON lines after an interrupted write."""

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


# Messages of the RuntimeError that torch raises if a file cannot be written.
_TORCH_CANNOT_WRITE = ("inline_container", "PytorchStreamWriter", "iostream error")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: it is either complete or missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(
    tensors: dict[str, Any], path: str | Path, metadata: dict[str, str] | None = None, save: Callable | None = None
) -> None:
    """Writes a safetensors file atomically, with the permissions that the umask gives.

    Args:
        tensors (`dict`): The tensors or arrays by name.
        path (`str` or `Path`): The file; its folder must exist.
        metadata (`dict[str, str]`, *optional*): Metadata of the file.
        save (`Callable`, *optional*): `save_file` of `safetensors.torch` (the default) or `safetensors.numpy`.

    Raises:
        `OSError`: If the file cannot be written.
    """
    if save is None:
        from safetensors.torch import save_file as save  # here, because it imports torch

    path = Path(path)
    with disk_errors(path), _partial(path) as partial:
        save(tensors, partial, metadata)
        follow_umask(partial)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block succeeds, and is deleted otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    if partial.is_symlink():  # writing would follow the link
        partial.unlink()
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(place: str | Path) -> Iterator[None]:
    """Converts the exceptions that safetensors and torch raise if a file cannot be written to `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EFBIG or error.filename is not None:
            raise
        raise OSError(f"{place}: cannot be written ({error.strerror})") from error
    except (SafetensorError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(sign in text for sign in _TORCH_CANNOT_WRITE):
            raise
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
        full = shutil.disk_usage(folder).free < 2**20
        reason = "no space left on the disk" if full or "os error 28" in text else text.strip().split("\n")[0]
        raise OSError(f"{place}: cannot be written ({reason})") from error


def follow_umask(path: str | Path) -> None:
    """Gives a file, or all files in a folder, the permissions of a new file. safetensors creates files that only their
    owner can read."""
    path = Path(path)
    probe = (path if path.is_dir() else path.parent) / f".mode-{secrets.token_hex(8)}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def json_lines(path: Path) -> list[tuple[str, Any]]:
    """Reads a JSON lines file to which lines are appended.

    The text after the last line break is an incomplete write (after a kill, or on a full disk) and is ignored.

    Returns:
        `list[tuple[str, Any]]`: The text and the value of each line; `("", None)` for invalid lines.

    Raises:
        `OSError`: If the file cannot be read or is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            text = line.decode("utf-8")
            lines.append((text, json.loads(text)))
        except (ValueError, RecursionError):
            lines.append(("", None))
    return lines
