"""Pushes the folder of a result to a repository on the Hugging Face Hub.

    push_result("runs/sd-1.4-safe", "user/sd-1.5-safe")

A push that fails leaves the files on disk complete and says how to try again.
"""

import logging
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..methods import method_label
from ..provenance import FILE_NAME, STUDENT_FILE, Provenance, load_record
from .base import find_base
from .cards import CARD_NAME, card_on_hub, is_ours, write_card
from .contents import as_published, check_folder, is_replaced, published_record, result_files
from .failures import may_pass, reason
from .model_cards import erasure_card, listed, student_card
from .model_index import check_evaluation


logger = logging.getLogger(__name__)

PUSH_FAILED = 3  # exit code of a command whose result is complete on disk, but not on the Hub
RETRY_WAITS = (2, 10, 30)  # seconds before each further attempt; the client retries single requests as well


class PushError(Exception):
    """A push that failed: one line that says why, and the command that tries again."""


def push_result(
    folder: str | Path,
    hub_model_id: str | None = None,
    token: str | None = None,
    private: bool = False,
    commit_message: str | None = None,
) -> str:
    """Publishes the folder of an erased model or of a student, in one commit: pipeline, erased weights, the record
    (`erasure.json` or `distillation.json`), images, evaluation, and a model card, which is also written to the folder.

    Checkpoints, logs and other files are not published. The index, weights, images and evaluation of an earlier result
    in the repository are replaced or deleted, so that the record always describes the weights next to it; other files
    are kept. A model card that a person wrote or edited is kept, on disk and on the Hub.

    Args:
        folder (`str` or `Path`): Output folder of a training.
        hub_model_id (`str`, *optional*): `"user/name"`, or a name in the account of the token. Default: the folder's
            name.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the token of `hf auth login`.
        private (`bool`, defaults to `False`): Make a new repository private.
        commit_message (`str`, *optional*): Default: a description of the erasure or distillation.

    Returns:
        `str`: The repository's URL.

    Raises:
        `ValueError`: If the folder holds no result, the name of the repository is invalid, or there is no token.
        [`PushError`]: If the Hub cannot be reached or refuses, after retries for busy servers and lost connections.
    """
    folder = Path(folder)
    hub_model_id = hub_model_id or default_model_id(folder)
    check_folder(folder)
    check_evaluation(folder)
    check_push(hub_model_id, token)
    record = load_record(folder)
    if isinstance(record, Provenance):
        card, done = erasure_card, f"Erase {listed(record.concepts, 5)} with {method_label(record.method)}"
    else:
        card, done = student_card, f"Distil {Path(record.teacher).name} into {Path(record.student).name}"
    base = find_base(record.base_model, record.revision, token)
    write_card(card(folder, hub_model_id, base), folder)  # even if the Hub cannot be reached

    def push() -> str:
        api = HfApi(token=token)
        repo_id = hub_model_id if "/" in hub_model_id else f"{api.whoami()['name']}/{hub_model_id}"
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        write_card(card(folder, url.repo_id, base), folder)
        _commit(api, files, url.repo_id, token, commit_message or done)
        return str(url)

    try:
        with as_published(folder, result_files(folder), published_record(record, base)) as files:
            return _with_retries(push)
    # hf_xet raises RuntimeError; the client raises ValueError for a person's card with broken metadata.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        again = ["diffusers-safe", "push", str(folder), "--hub_model_id", hub_model_id]
        raise PushError(
            f"not pushed: {reason(error)}. The result in {folder} is complete; push it later with: "
            f"{shlex.join([*again, *(['--hub_private'] if private else [])])}"
        ) from error


def push_or_exit(folder: str | Path, hub_model_id: str | None, token: str | None, private: bool) -> None:
    """[`push_result`] for commands: prints the URL, or exits with [`PUSH_FAILED`]."""
    try:
        print(f"published at {push_result(folder, hub_model_id, token, private)}")
    except PushError as error:
        logger.debug("traceback:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(PUSH_FAILED) from None


def default_model_id(folder: str | Path) -> str:
    """The name of the folder."""
    return Path(folder).resolve().name


def check_model_id(hub_model_id: str) -> None:
    """
    Raises:
        `ValueError`: If it cannot be the name of a repository.
    """
    try:
        validate_repo_id(hub_model_id)
    except HFValidationError:
        raise ValueError(
            f"hub_model_id '{hub_model_id}': not a name of a repository; give user/name or name, of letters, digits, "
            "'-', '_' and '.', 96 at most"
        ) from None


def check_push(hub_model_id: str, token: str | None = None) -> None:
    """Checks everything about a push that can be checked without the network, before hours of work.

    Raises:
        `ValueError`: If the name of the repository is invalid, there is no token, or the client is in offline mode.
    """
    check_model_id(hub_model_id)
    if not (token or get_token()):
        raise ValueError("hub_token: none given; give --hub_token, set HF_TOKEN, or log in with `hf auth login`")
    if is_offline_mode():
        raise ValueError("push: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")


def _commit(api: HfApi, files: dict[str, Path], repo_id: str, token: str | None, message: str) -> None:
    there = card_on_hub(repo_id, token)
    if there is not None and not is_ours(there):
        logger.warning("%s: its %s on the Hub was written or edited by a person, and is kept", repo_id, CARD_NAME)
        files = {name: path for name, path in files.items() if name != CARD_NAME}
    on_hub = api.list_repo_files(repo_id)
    ours = FILE_NAME in on_hub or STUDENT_FILE in on_hub
    stale = [path for path in on_hub if is_replaced(path)] if ours else []
    # Not `upload_folder`, which may make several commits of a large folder.
    api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            *(CommitOperationDelete(path, is_folder=False) for path in stale if path not in files),
        ],
        commit_message=message,
    )


def _with_retries(push: Callable[[], str]) -> str:
    for wait in RETRY_WAITS:
        try:
            return push()
        except (HTTPError, OSError, RuntimeError) as error:
            if not may_pass(error):
                raise
            logger.warning("%s; trying again in %d s", reason(error), wait)
        time.sleep(wait)
    return push()
