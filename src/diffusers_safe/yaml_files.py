"""YAML files as texts, lists and mappings: no tags, no repeated keys, no alias bombs."""

import re
from pathlib import Path
from typing import Any

import yaml

from .values import shown


MAX_YAML_BYTES = 2**24
MAX_YAML_ALIASES = 100


class TextLoader(yaml.BaseLoader):
    """Every value as text, as on a command line (`no` is a word), but null; a key is there once."""

    aliases = 0

    def compose_node(self, parent, index):
        """A few aliases (`*name`) are a convenience, many make gigabytes of a small file."""
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_YAML_ALIASES:
            raise yaml.constructor.ConstructorError(
                problem=f"more than {MAX_YAML_ALIASES} aliases", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and (name := name.replace("-", "_")) in seen:
                raise yaml.constructor.ConstructorError(problem=f"{shown(name)} twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_NULL = "tag:yaml.org,2002:null"
TextLoader.add_implicit_resolver(_NULL, re.compile("^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
TextLoader.add_constructor(_NULL, lambda loader, node: None)


def _refuse_tag(loader: TextLoader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(
        problem=f"the tag {shown(node.tag)}: values are texts, lists and mappings", problem_mark=node.start_mark
    )


for _tag, _construct in {"str": "scalar", "seq": "sequence", "map": "mapping"}.items():
    TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(TextLoader, f"construct_{_construct}"))
TextLoader.add_constructor(None, _refuse_tag)


def read_yaml(path: str | Path, name: str) -> Any:
    """Reads a YAML file: texts, `None`, lists and mappings.

    Args:
        path (`str` or `Path`): The file.
        name (`str`): What it is, for messages.

    Raises:
        `ValueError`: If it cannot be read, is larger than 16 MiB or nested too deeply, or has a key twice.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ValueError(f"{name} {path}: is larger than {MAX_YAML_BYTES >> 20} MiB")
        return yaml.load(data.decode("utf-8-sig"), TextLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or type(error).__name__
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else reason
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
        mark = getattr(error, "problem_mark", None)  # the line's text may hold a secret
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name} {path}: cannot be read as YAML ({reason}{where})") from None
