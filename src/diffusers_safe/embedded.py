"""The models that the package carries. Wherever a model is given, these names stand for their folders."""

import os
from pathlib import Path


EMBEDDED_MODELS = {
    "emoji": Path(__file__).parent / "emoji" / "model",  # a StableDiffusionPipeline
}


def locate_model(name_or_path: str | Path) -> str:
    """The folder of an embedded model, if this is its name and no folder of that name is here; else what was given."""
    folder = EMBEDDED_MODELS.get(str(name_or_path))
    return str(name_or_path) if folder is None or os.path.exists(name_or_path) else str(folder)


def embedded_name(path: str | Path) -> str | None:
    """The name of an embedded model, by its folder."""
    place = os.path.realpath(path)
    return next((name for name, folder in EMBEDDED_MODELS.items() if os.path.realpath(folder) == place), None)
