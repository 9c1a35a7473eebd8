"""What the cards of erased models and of students have in common."""

from pathlib import Path
from typing import Any

from ..report.results import headline_table
from .base import Base
from .contents import evaluation_files, find_results, read_results


MOST_LISTED = 30  # names on a card; the record beside it has all of them


def base_link(base: Base) -> str:
    """The name of the model that was changed, with a link where it is on the Hub."""
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else code(base.name)


def measured(folder: Path, open_question: str) -> str:
    """What an evaluation beside the model says; without one that the question is open."""
    path = find_results(folder)
    if path is None:
        return (
            f"Nothing yet: no evaluation lies beside this model. {open_question} has to be measured before anybody "
            "relies on it. Pictures are no measurement."
        )
    beside = [f"[{name.name}]({name.relative_to(folder).as_posix()})" for name in evaluation_files(folder)]
    results = read_results(path)
    told = "in brackets 95 % intervals, in parentheses differences to the first model on the same prompts and seeds"
    table = f"{headline_table(results)}\n\nN images; {told}. " if "headline" in results else ""
    return (
        f"{table}All numbers and how they were made: {' and '.join(beside)}. Numbers made in another way cannot be "
        "compared with these."
    )


def licence_text(base: Base) -> str:
    """Which licence holds."""
    licence = base.metadata.get("license")
    if licence is None:
        return (
            "The base model's licence holds for this model, too. It is not known here: the base model's card does not "
            "name one, or could not be read. Find out before you use or share this model."
        )
    name = base.metadata.get("license_name") or licence
    link = base.metadata.get("license_link")
    named = f"[{name}]({link})" if link else code(str(name))
    return f"The base model's licence, {named}, holds for this model, too."


def listed(names: list[str], most: int) -> str:
    """Names in one line, the first ones of many."""
    shown = " ".join(", ".join(names[:most]).split())
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def facts_table(told: dict[str, str], arguments: dict[str, Any]) -> str:
    """Facts as a table, and arguments as one that is folded."""
    rows = [f"| {name.replace('_', ' ')} | {cell(value)} |" for name, value in told.items()]
    details = [f"| `{name}` | {cell(code(_argument(value)))} |" for name, value in arguments.items()]
    return "\n".join([
        *("| | |", "|---|---|", *rows),
        *("", "<details><summary>All arguments</summary>", "", "| | |", "|---|---|", *details, "", "</details>"),
    ])  # fmt: skip


def _argument(value: Any) -> str:
    return listed([str(item) for item in value], MOST_LISTED) if isinstance(value, list) else str(value)


def code(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = " ".join(text.split())
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (text.count("`") + 1)
    return f"{fence} {text} {fence}"


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")
