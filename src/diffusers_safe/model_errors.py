"""Errors of models that cannot be loaded, in one line with model and component."""

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError


class ModelError(ValueError):
    """A model that cannot be loaded. The message is one line that names the model and the component."""

    exit_code = 2


def reason(error: BaseException) -> str:
    """Why a file or a model cannot be read, in one line."""
    cause = error
    while (cause := cause.__cause__ or cause.__context__) is not None:  # the message of diffusers says less
        if isinstance(cause, (SafetensorError, pickle.UnpicklingError)):
            error = cause
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, SafetensorError):
        return f"not a whole safetensors file ({error})"
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"refused, the pickle holds more than tensors (it names {found[1]})"
            if found
            else "not a file of torch.save"
        )
    if isinstance(error, EOFError):
        return "it ends too early"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({str(error.filename)[-100:]})' if error.filename else ''}"
    if "PytorchStreamReader" in str(error):
        return "it is not whole"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).split(" If you want")[0]
    named = "" if type(error) in (ValueError, OSError) and text else type(error).__name__
    return f"{named}{': ' if named and text else ''}{text[:300]}"


def shown(name: str | Path) -> str:
    """A name or path as messages show it: what is very long is cut."""
    text = str(name).replace("\0", "\\0")
    return text if len(text) <= 500 else f"{text[:100]}...{text[-100:]}"


@contextmanager
def naming(what: str, *kept: type[Exception]) -> Iterator[None]:
    """Turns every error of the libraries that read a model into a [`ModelError`] that begins with `what`; those that
    are `kept` stay as they are."""
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError, *kept):
        raise
    except Exception as error:  # they raise errors of many types for a damaged file
        raise ModelError(f"{what}: {reason(error)}".replace(f" ({what})", "")) from error
