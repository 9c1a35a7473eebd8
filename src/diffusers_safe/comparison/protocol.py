"""The protocol that results record: which prompts and seeds, which settings, which versions."""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone

from ..generation.rows import PromptRow
from ..provenance import library_versions


def make_protocol(
    rows: Sequence[PromptRow], prompts: dict, counts: dict, settings: dict, original: str, safety_checker: str, **more
) -> dict:
    """The `protocol` of a `results.json`.

    Args:
        rows (`Sequence[PromptRow]`): What was generated with each model.
        prompts (`dict`): Source of the prompts.
        counts (`dict`): Numbers of images or rows.
        settings (`dict`): How the original model was sampled.
        original (`str`): Name of the original model.
        safety_checker (`str`): Whether safety checkers were on.
        more: Further entries.
    """
    seeds = [row.seed for row in rows]
    return {
        "prompts": {
            **prompts,
            "different": len({row.prompt for row in rows}),
            **counts,
            "seeds": [min(seeds), max(seeds)],
            "sha256": prompts_digest(rows),
        },
        "settings": settings,
        "original": original,
        "safety_checker": safety_checker,
        **more,
        "versions": library_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def prompts_digest(rows: Sequence[PromptRow]) -> str:
    """A hash of ids, prompts and seeds."""
    text = json.dumps([[row.id, row.prompt, row.seed] for row in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
