"""The models that ship with the package; commands, `erase`, `distill` and erased pipelines take their names."""

import os
from pathlib import Path


EMBEDDED_MODELS = {
    "emoji": Path(__file__).parent / "emoji" / "model",  # a StableDiffusionPipeline
    "emoji-flow": Path(__file__).parent / "emoji" / "model_flow",  # a StableDiffusion3Pipeline
}


def locate_model(name_or_path: str | Path) -> str:
    """The folder of an embedded model, if this is its name and no folder with that name exists; otherwise the
    argument.

    Raises:
        `ValueError`: If it is blank.
    """
    if not str(name_or_path).strip():
        raise ValueError(f"model '{name_or_path}': is empty; give a folder, a Hub id or {', '.join(EMBEDDED_MODELS)}")
    folder = EMBEDDED_MODELS.get(str(name_or_path))
    return str(name_or_path) if folder is None or os.path.exists(name_or_path) else str(folder)


def check_revision(revision: str | None, model: str | Path | None, name: str = "revision") -> None:
    """Checks that a revision is not given for a model in a folder or file, which has none.

    Args:
        revision (`str`, *optional*): Of the model on the Hub.
        model (`str` or `Path`, *optional*): The model.
        name (`str`, defaults to `"revision"`): Of the option.

    Raises:
        `ValueError`: If it is.
    """
    if revision is not None and model is not None and os.path.exists(locate_model(model)):
        raise ValueError(f"{name} {revision}: {model} is on this computer and has no revisions; leave the option out")


def embedded_name(path: str | Path) -> str | None:
    """The name of the embedded model in a folder, or `None`."""
    place = os.path.realpath(path)
    return next((name for name, folder in EMBEDDED_MODELS.items() if os.path.realpath(folder) == place), None)
