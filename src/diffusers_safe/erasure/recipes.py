"""Recipes that ship with the package: YAML files of options with the key `method`, known by name.

In a clone they are the folder `examples/`; an installed package has them in its folder `recipes`.
"""

from pathlib import Path

import yaml

from ..values import plain_word, suggested


_PACKAGE = Path(__file__).parents[1]
FOLDER = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parents[1] / "examples"


def recipes() -> dict[str, Path]:
    """The files by name, such as `"emoji-cat-sdd"`."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: path for name, path in found.items() if "method" in yaml.safe_load(path.read_text(encoding="utf-8"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe; `-sdd` may be left out of the name, and `1.4` of `sd-1.4`.

    Raises:
        `ValueError`: If there is none.
    """
    known = recipes()
    name = plain_word(name)
    for wanted in (name, f"{name}-sdd"):
        for recipe, path in known.items():
            if wanted in (recipe, recipe.replace("sd-1.4-", "sd-")):
                return path
    raise ValueError(f"recipe {suggested(name, known, '')}: unknown; there are {', '.join(known)}")
