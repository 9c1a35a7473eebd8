"""The base model of an erasure, as its card describes it: its name on the Hub and its licence."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..embedded import embedded_name, locate_model
from .cards import CARD_NAME, card_on_hub
from .failures import reason


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """What is known of a base model.

    Attributes:
        name (`str`): Its id on the Hub, or the name of its folder.
        on_hub (`bool`): Whether it is on the Hub.
        metadata (`dict`): `base_model`, `license`, `license_name` and `license_link`, as far as its card has them.
    """

    name: str
    on_hub: bool
    metadata: dict[str, Any]


def find_base(base_model: str, revision: str | None = None, token: str | None = None) -> Base:
    """Reads the card of a base model, in its folder or on the Hub, for what the card of a derived model must say.

    If the card is missing, broken or cannot be reached, this remains unknown; nothing is raised.
    """
    folder = Path(locate_model(base_model))
    if folder.exists():
        path = folder / CARD_NAME
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        own = _front_matter(text)
        metadata = {"base_model": own.get("base_model"), **_licence(own)}
        return Base(embedded_name(folder) or folder.resolve().name, False, _known(metadata))
    try:
        validate_repo_id(base_model)
        own = _front_matter(card_on_hub(base_model, token, revision=revision, max_retries=0) or "")
    except (HFValidationError, RepositoryNotFoundError):
        return Base(Path(base_model).name, False, {})  # a folder that does not exist anymore
    except (HTTPError, OSError) as error:
        logger.warning("the card of %s cannot be read (%s): its licence is unknown", base_model, reason(error))
        own = {}
    metadata = {"base_model": base_model, **_licence(own, f"https://huggingface.co/{base_model}/blob/main/")}
    return Base(base_model, True, _known(metadata))


def _front_matter(card: str) -> dict[str, Any]:
    if not card.startswith("---"):
        return {}
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}


def _licence(own: dict[str, Any], home: str | None = None) -> dict[str, Any]:
    """The licence fields of a card. A relative link is completed with `home`, and dropped if there is none."""
    link = own.get("license_link")
    if isinstance(link, str) and "://" not in link:
        link = f"{home}{link}" if home else None
    return {"license": own.get("license"), "license_name": own.get("license_name"), "license_link": link}


def _known(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if value is not None}
