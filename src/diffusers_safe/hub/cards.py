"""Writes model cards and recognises them later: a card that a person wrote or edited is kept.

A generated card contains a digest of its own text. If the two do not match, a person has edited the card.
"""

import hashlib
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_url
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from ..provenance import write_text


CARD_NAME = "README.md"
_MARK = "<!-- written by diffusers_safe, {digest}; once you change this file it is yours, and is kept -->"
_FIND_MARK = re.compile(re.escape(_MARK).replace(re.escape("{digest}"), "([0-9a-f]{16})"))


def make_card(data: ModelCardData, text: str) -> ModelCard:
    """Makes a card for which [`is_ours`] is true, from metadata and Markdown."""
    content = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_MARK}\n\n{text}"))
    return ModelCard(content.replace("{digest}", _digest(content), 1))


def is_ours(card: str) -> bool:
    """Whether this package wrote a card and it has not been edited since."""
    card = card.replace("\r\n", "\n")
    mark = _FIND_MARK.search(card)
    return mark is not None and _digest(card.replace(mark[1], "{digest}", 1)) == mark[1]


def write_card(card: ModelCard, folder: str | Path) -> None:
    """Writes a card into a folder, unless a person wrote or edited the one there."""
    path = Path(folder) / CARD_NAME
    if not path.exists() or is_ours(path.read_text(encoding="utf-8", errors="replace")):
        write_text(path, str(card))


def card_on_hub(
    repo_id: str,
    token: str | bool | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    max_retries: int = 5,
) -> str | None:
    """The current text of a repository's card on the Hub, not a cached copy; `None` if there is no card.

    Raises:
        `HfHubHTTPError` or another `HTTPError`: If the Hub does not answer.
    """
    url = hf_hub_url(repo_id, CARD_NAME, subfolder=subfolder, revision=revision)
    response = http_backoff("GET", url, headers=build_hf_headers(token=token), max_retries=max_retries)
    try:
        hf_raise_for_status(response)
    except RemoteEntryNotFoundError:
        return None
    return response.content.decode("utf-8", errors="replace")


def _digest(unsigned: str) -> str:
    return hashlib.sha256(unsigned.encode()).hexdigest()[:16]
