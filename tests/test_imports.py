"""Imports point one way (docs/architecture.md), and importing does nothing."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_safe


SOURCE = Path(diffusers_safe.__file__).parent
# Each layer may import from those above it and from itself.
LAYERS = [
    {
        *("arguments", "command_line", "concepts", "embedded", "files", "images", "loading", "messages"),
        *("model_errors", "model_files"),
        *("output_folders", "progress", "provenance", "values", "yaml_files"),
    },
    {"families"},
    {"diffusion"},
    {"weights"},
    {"methods"},
    {"report"},
    {"formats"},
    {"hub"},
    {"pipelines"},
    {"generation", "preparation"},
    {"metrics"},
    {"comparison"},
    {"training"},
    {"erasure", "distillation"},
    {"attacks"},
    {"emoji"},
    {"commands", "cli"},
]
STRANGERS = [
    ("pipelines", "training"),
    ("training", "pipelines"),
    ("attacks", "pipelines"),
    ("erasure", "distillation"),
]
# Names of modules that earlier versions ran with `python -m`; they start what is now elsewhere.
OLD_DOORS = {"training/sdd.py", "training/esd.py", "training/distillation.py"}


def package_imports():
    """(importing part, imported part, file) of every import inside the package."""
    for path in SOURCE.rglob("*.py"):
        parts = ("diffusers_safe", *path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = [*parts[: -node.level], *(node.module or "").split(".")]
                names = [node.module.split(".")[0]] if len(parts) - node.level == 1 and node.module else [target[1]]
                if target == ["diffusers_safe", ""]:
                    names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers_safe."):
                names = [node.module.split(".")[1]]
            else:
                continue
            for name in names:
                yield parts[1], name, path


def test_imports_point_one_way():
    rank = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    seen = 0
    for importer, imported, path in package_imports():
        if importer == "__init__" or str(path.relative_to(SOURCE)) in OLD_DOORS:
            continue
        seen += 1
        assert rank[imported] <= rank[importer], f"{path}: {importer} must not import {imported}"
        assert (importer, imported) not in STRANGERS, f"{path}: {importer} must not import {imported}"
    assert seen > 30


def test_importing_the_package_is_quick_and_quiet():
    code = "import sys, diffusers_safe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and done.stderr == ""


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`A` requires torchvision (not installed); falling back to `APil` for backward compatibility.", False),
        ("`A` requires torchvision", True),
    ],
)
def test_only_what_transformers_says_of_a_missing_torchvision_is_left_out(message, shown):
    logger = logging.getLogger("transformers.utils.import_utils")
    record = logger.makeRecord(logger.name, logging.WARNING, "", 0, message, (), None)
    assert bool(logger.filter(record)) == shown


def test_no_files_import_each_other_in_a_circle():
    names = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    imports = {}
    for name, path in names.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
                found |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
        # A package hands names on; who imports one of its files does not import its face.
        imports[name] = {other for other in found & names.keys() if names[other].name != "__init__.py"}

    def reaches(start, name, seen):
        fresh = imports[name] - seen
        seen |= fresh
        return start in imports[name] or any(reaches(start, other, seen) for other in fresh)

    assert sum(map(len, imports.values())) > 300
    assert [name for name in imports if reaches(name, name, set())] == []
