"""An erased model as a repository on the Hugging Face Hub: its model card, made from facts, and the push.

    push_result("runs/sd-1.5-safe", "user/sd-1.5-safe")

What is on disk stays whole whatever the network does; a push that fails says how to try again.
"""

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever the client of this version uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .cards import CARD_NAME, card_on_hub, is_ours, make_card, write_card
from .evaluation.grid import GRID_NAME
from .evaluation.report import headline_table
from .formats import INDEX, LORA_NAME, PARTIAL_NAME, UNET_FOLDER
from .provenance import FILE_NAME, Provenance
from .weights import TRAIN_METHODS


logger = logging.getLogger(__name__)

PUSH_FAILED = 3  # exit code of a command whose result is complete on disk, but not on the Hub
RETRY_WAITS = (2, 10, 30)  # seconds before each further attempt; the client retries single requests, too
MOST_CONCEPTS = 30  # listed on a card; erasure.json has all of them

_RESULTS = ("results.json", "evaluation/results.json")
_REPORTS = ("report.html", "evaluation/report.html")
# What is published, beside the folders that model_index.json names and an evaluation; all else stays where it is.
_PUBLISHED = (CARD_NAME, FILE_NAME, INDEX, GRID_NAME, "*.safetensors", "LICENSE*")
# What is deleted from a repository of ours where a new result does not have it, beside the folders of models.
_REPLACED = (INDEX, GRID_NAME, PARTIAL_NAME, LORA_NAME, *_RESULTS, *_REPORTS)
_MODELS = (UNET_FOLDER, "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
           "safety_checker", "feature_extractor", "image_encoder")  # fmt: skip

# method -> (its name, its paper)
_METHODS = {
    "sdd": ("Safe self-Distillation Diffusion (SDD)", "2307.05977"),
    "esd": ("Erasing Concepts from Diffusion Models (ESD)", "2303.07345"),
}


class PushError(Exception):
    """A push that failed: one line that says why, and the command that tries again."""


# --- push ------------------------------------------------------------------------------------------------------------


def push_result(
    folder: str | Path,
    hub_model_id: str | None = None,
    token: str | None = None,
    private: bool = False,
    commit_message: str | None = None,
) -> str:
    """Publishes the folder of an erased model, in one commit: pipeline, erased weights, `erasure.json`, pictures,
    evaluation, and a model card, which is also written into the folder.

    Checkpoints, logs and other files are not published. If an earlier erasure is in the repository, its index,
    weights, pictures and evaluation are replaced or deleted, so that `erasure.json` always tells of the weights beside
    it; files of other names are left alone. A model card that a person wrote or edited is kept, on disk and on the
    Hub.

    Args:
        folder (`str` or `Path`): What an erasure wrote.
        hub_model_id (`str`, *optional*): `"user/name"`, or a name in the account of the token; default the folder's.
        token (`str`, *optional*): Default `HF_TOKEN`, or the one of `hf auth login`.
        private (`bool`, defaults to `False`): Make the repository private, if it is a new one.
        commit_message (`str`, *optional*): Default says what was erased and how.

    Returns:
        `str`: The repository's address.

    Raises:
        `ValueError`: If the folder holds no erased model, the name is none for a repository, or there is no token.
        [`PushError`]: If the Hub cannot be reached or refuses. Busy servers and cut connections were tried again.
    """
    folder = Path(folder)
    hub_model_id = hub_model_id or default_model_id(folder)
    check_folder(folder)
    check_push(hub_model_id, token)
    provenance = Provenance.load(folder)
    message = commit_message or f"Erase {_listed(provenance.concepts, 5)} with {provenance.method.upper()}"
    base = find_base(provenance.base_model, provenance.revision, token)
    write_card(erasure_card(folder, hub_model_id, base), folder)  # there, even if the Hub is not

    def push() -> str:
        api = HfApi(token=token)
        repo_id = hub_model_id if "/" in hub_model_id else f"{api.whoami()['name']}/{hub_model_id}"
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        write_card(erasure_card(folder, url.repo_id, base), folder)
        _commit(api, folder, url.repo_id, token, message)
        return str(url)

    try:
        return _with_retries(push)
    # RuntimeError is what hf_xet raises; ValueError, the client for a card of one's own with broken metadata.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        again = ["diffusers-safe", "push", str(folder), "--hub_model_id", hub_model_id]
        raise PushError(
            f"not pushed: {_reason(error)}. The result in {folder} is complete; push it later with: "
            f"{shlex.join([*again, *(['--hub_private'] if private else [])])}"
        ) from error


def push_or_exit(folder: str | Path, hub_model_id: str | None, token: str | None, private: bool) -> None:
    """[`push_result`] as a command does it: tells the address, or ends the program with [`PUSH_FAILED`]."""
    try:
        print(f"published at {push_result(folder, hub_model_id, token, private)}")
    except PushError as error:
        logger.debug("where it happened:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(PUSH_FAILED) from None


def default_model_id(folder: str | Path) -> str:
    """The name of the folder."""
    return Path(folder).resolve().name


def check_model_id(hub_model_id: str) -> None:
    """
    Raises:
        `ValueError`: If it is no name for a repository.
    """
    try:
        validate_repo_id(hub_model_id)
    except HFValidationError:
        raise ValueError(
            f"hub_model_id '{hub_model_id}': no name for a repository; give user/name or name, of letters, digits, "
            "'-', '_' and '.', 96 at most"
        ) from None


def check_push(hub_model_id: str, token: str | None = None) -> None:
    """Everything about a push that can be known without the network, so that it is told before hours of work.

    Raises:
        `ValueError`: If the name is none for a repository, there is no token, or the client was told to stay offline.
    """
    check_model_id(hub_model_id)
    if not (token or get_token()):
        raise ValueError("hub_token: there is none; give --hub_token, set HF_TOKEN, or log in with `hf auth login`")
    if is_offline_mode():
        raise ValueError("push: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")


def check_folder(folder: str | Path) -> None:
    """
    Raises:
        `ValueError`: If the folder does not hold a finished erasure.
    """
    Provenance.load(folder)
    if not any(fnmatch(name, "*.safetensors") for name in result_files(Path(folder))):
        raise ValueError(f"{folder}: holds {FILE_NAME}, but neither a pipeline nor erased weights")


def result_files(folder: Path) -> list[str]:
    """The files of a result, as paths inside the folder; hidden ones are none."""
    found = [path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in _PUBLISHED)]
    for part in _parts(folder):
        found += (folder / part).rglob("*")
    if (results := find_results(folder)) is not None:
        found += [results, results.with_name("report.html")]
    names = [path.relative_to(folder) for path in found if path.is_file()]
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _parts(folder: Path) -> list[str]:
    """The folders of a pipeline's models, or that of the UNet where it was saved alone."""
    index = folder / INDEX
    entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {UNET_FOLDER: []}
    return [name for name, value in entries.items() if isinstance(value, list) and (folder / name).is_dir()]


def _commit(api: HfApi, folder: Path, repo_id: str, token: str | None, message: str) -> None:
    files = result_files(folder)
    there = card_on_hub(repo_id, token)
    if there is not None and not is_ours(there):
        logger.warning("%s: its %s on the Hub was written or edited by a person, and is kept", repo_id, CARD_NAME)
        files.remove(CARD_NAME)
    on_hub = api.list_repo_files(repo_id)
    stale = []
    if FILE_NAME in on_hub:
        stale = [path for path in on_hub if path in _REPLACED or path.split("/")[0] in _MODELS]
    # Not `upload_folder`, which may make several commits of a large folder.
    api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, folder / path) for path in files),
            *(CommitOperationDelete(path, is_folder=False) for path in stale if path not in files),
        ],
        commit_message=message,
    )


def _with_retries(push: Callable[[], str]) -> str:
    for wait in RETRY_WAITS:
        try:
            return push()
        except (HTTPError, OSError, RuntimeError) as error:
            if not _may_pass(error):
                raise
            logger.warning("%s; trying again in %d s", _reason(error), wait)
        time.sleep(wait)
    return push()


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, OSError):
        return isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, OfflineModeIsEnabled)
    return True


def _reason(error: Exception) -> str:
    """What happened, in one line."""
    told = " ".join(str(getattr(error, "server_message", None) or error).split())[:200].rstrip(".")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept the token (401)"
        if status == 403:
            return f"the token has no right to write there (403: {told})"
        if _may_pass(error):
            return f"the Hub cannot answer now ({status} {error.response.reason_phrase})"
        return f"the Hub refuses ({status}: {told})"
    if isinstance(error, HTTPError) or _may_pass(error):
        return f"no connection to the Hub ({type(error).__name__}: {told})"
    return told


# --- the base model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What is known of the model that was changed.

    Attributes:
        name (`str`): Its id on the Hub, or the name of its folder.
        on_hub (`bool`): Whether it is there.
        metadata (`dict`): `base_model`, `license`, `license_name` and `license_link`, as far as its card tells.
    """

    name: str
    on_hub: bool
    metadata: dict[str, Any]


def find_base(base_model: str, revision: str | None = None, token: str | None = None) -> Base:
    """Reads a base model's card, in its folder or on the Hub, for what a derived model's card must say.

    A card that is missing, broken or out of reach leaves things unknown; it raises nothing.
    """
    if Path(base_model).exists():
        path = Path(base_model) / CARD_NAME
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        own = _front_matter(text)
        metadata = {"base_model": own.get("base_model"), **_licence(own)}
        return Base(Path(base_model).resolve().name, False, _known(metadata))
    try:
        validate_repo_id(base_model)
        own = _front_matter(card_on_hub(base_model, token, revision=revision, max_retries=0) or "")
    except (HFValidationError, RepositoryNotFoundError):
        return Base(Path(base_model).name, False, {})  # a folder that is gone
    except (HTTPError, OSError) as error:
        logger.warning("the card of %s cannot be read (%s): its licence stays unknown", base_model, _reason(error))
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
    """A link inside the base's repository is followed from `home`; without one it would lead nowhere."""
    link = own.get("license_link")
    if isinstance(link, str) and "://" not in link:
        link = f"{home}{link}" if home else None
    return {"license": own.get("license"), "license_name": own.get("license_name"), "license_link": link}


def _known(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if value is not None}


# --- the model card --------------------------------------------------------------------------------------------------


def find_results(folder: str | Path) -> Path | None:
    """The evaluation beside an erased model: `results.json` in its folder or in `evaluation/`, unless it is older than
    the erasure, and so of another one."""
    provenance = Provenance.load(folder)
    for name in _RESULTS:
        if (path := Path(folder) / name).is_file():
            created = _read_results(path).get("protocol", {}).get("created")
            if created is None or str(created) >= provenance.created:
                return path
    return None


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as the results of an evaluation ({error})") from None
    if not isinstance(results, dict) or not isinstance(results.get("protocol", {}), dict):
        raise ValueError(f"{path}: not the results of an evaluation")
    return results


def erasure_card(folder: str | Path, repo_id: str, base: Base) -> ModelCard:
    """The model card of an erased model, from what lies in its folder.

    Args:
        folder (`str` or `Path`): With `erasure.json` and the model.
        repo_id (`str`): Where it is or will be on the Hub.
        base (`Base`): Of [`find_base`].
    """
    folder = Path(folder)
    provenance = Provenance.load(folder)
    sections = [
        _what(folder, provenance, repo_id, base),
        _pictures(folder),
        "## How to use it\n\n" + _usage(folder, provenance, repo_id, base),
        "## What was measured\n\n" + _measured(folder),
        "## How it was made\n\n" + _how(provenance, base),
        _LIMITS,
        "## Licence\n\n" + _licence_text(base),
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "text-to-image", "concept-erasure", provenance.method, "diffusers-safe"],
        **base.metadata,
    )
    return make_card(data, "\n\n".join(section for section in sections if section) + "\n")


def _what(folder: Path, provenance: Provenance, repo_id: str, base: Base) -> str:
    concepts = [f"* {_code(concept)}" for concept in provenance.concepts[:MOST_CONCEPTS]]
    if more := len(provenance.concepts) - MOST_CONCEPTS:
        concepts += [f"* and {more} more, which [`{FILE_NAME}`]({FILE_NAME}) names"] if more > 0 else []
    name, paper = _METHODS.get(provenance.method, (provenance.method.upper(), None))
    whole = " Nothing else has to be switched on when it is used." if (folder / INDEX).is_file() else ""
    source = provenance.arguments.get("erase_from")
    only = f" They were erased from what {_code(source)} says; other prompts were left alone." if source else ""
    by = f"{name}, [arXiv {paper}](https://arxiv.org/abs/{paper})" if paper else name
    return (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"{_base_link(base)}, a text-to-image model, after training to forget:\n\n" + "\n".join(concepts) + "\n\n"
        f"Its weights were changed by {by}.{whole}{only}"
    )


def _base_link(base: Base) -> str:
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else _code(base.name)


def _pictures(folder: Path) -> str:
    if not (folder / GRID_NAME).is_file():
        return ""
    return (
        f"![The same prompts and seeds before and after the erasure]({GRID_NAME})\n\n"
        "Each column is one prompt, drawn from the same noise by the base model (before) and by this model (after)."
    )


def _usage(folder: Path, provenance: Provenance, repo_id: str, base: Base) -> str:
    of_base = f'"{base.name}"' if base.on_hub else '"path/to/the/base/model"'
    for name, value in {"revision": provenance.revision, "variant": provenance.arguments.get("variant")}.items():
        of_base += f', {name}="{value}"' if value else ""
    ways = []
    if (folder / INDEX).is_file():
        name = json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"]
        ways.append(
            "A stock diffusers pipeline; no other package is needed.\n\n"
            f"```python\nfrom diffusers import {name}\n\n"
            f'pipeline = {name}.from_pretrained("{repo_id}")\nimage = pipeline("a photo of a cat").images[0]\n```'
        )
    elif (folder / UNET_FOLDER).is_dir():
        ways.append(
            "The UNet alone, for the base model's pipeline:\n\n"
            "```python\nfrom diffusers import DiffusionPipeline, UNet2DConditionModel\n\n"
            f'unet = UNet2DConditionModel.from_pretrained("{repo_id}", subfolder="{UNET_FOLDER}")\n'
            f"pipeline = DiffusionPipeline.from_pretrained({of_base}, unet=unet)\n```"
        )
    if (folder / LORA_NAME).is_file():
        ways.append(
            "A LoRA, for the base model and no other:\n\n"
            "```python\nfrom diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({of_base})\n"
            f'pipeline.load_lora_weights("{repo_id}")\n```'
        )
    if (folder / PARTIAL_NAME).is_file():
        ways.append(
            f"`{PARTIAL_NAME}` holds only the weights that were trained. They go into the base model, and no other: "
            "the package `diffusers-safe` checks that.\n\n"
            "```python\nfrom diffusers import DiffusionPipeline\nfrom diffusers_safe.formats import load_partial\n"
            "from huggingface_hub import hf_hub_download\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({of_base})\n"
            f'load_partial(pipeline.unet, hf_hub_download("{repo_id}", "{PARTIAL_NAME}"))\n```'
        )
    return "\n\n".join(ways)


def _measured(folder: Path) -> str:
    path = find_results(folder)
    if path is None:
        return (
            "Nothing yet: no evaluation lies beside this model. Whether the concepts are gone, and what else was lost "
            "with them, has to be measured before anybody relies on it. Pictures are no measurement."
        )
    beside = [f"[{name.name}]({name.relative_to(folder).as_posix()})"
              for name in (path, path.with_name("report.html")) if name.is_file()]  # fmt: skip
    results = _read_results(path)
    table = f"{headline_table(results)}\n\nN images; in brackets 95 % intervals. " if "headline" in results else ""
    return (
        f"{table}All numbers and how they were made: {' and '.join(beside)}. Numbers made in another way cannot be "
        "compared with these."
    )


def _how(provenance: Provenance, base: Base) -> str:
    revision = f", revision {_code(provenance.revision)}" if provenance.revision else ""
    method = TRAIN_METHODS.get(provenance.train_method)
    told = {
        "base model": f"{_base_link(base)}{revision}, fingerprint of its denoiser `{provenance.base_fingerprint}`",
        "method": f"`{provenance.method}`",
        "trained weights": f"`{provenance.train_method}`" + (f": {method.description}" if method else ""),
        "when": provenance.created,
        "with": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
    }
    # Paths are of somebody's machine, and tell readers nothing.
    arguments = {
        name: value
        for name, value in provenance.arguments.items()
        if not name.endswith(("_dir", "_path", "_checkpoint")) and name not in ("concepts", "train_method", "config")
        if value not in (None, "", [])
    }
    rows = [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in told.items()]
    details = [f"| `{name}` | {_cell(_code(_argument(value)))} |" for name, value in arguments.items()]
    return "\n".join([
        *("| | |", "|---|---|", *rows),
        *("", "<details><summary>All arguments</summary>", "", "| | |", "|---|---|", *details, "", "</details>"),
    ])  # fmt: skip


def _licence_text(base: Base) -> str:
    licence = base.metadata.get("license")
    if licence is None:
        return (
            "The base model's licence holds for this model, too. It is not known here: the base model's card does not "
            "name one, or could not be read. Find out before you use or share this model."
        )
    name = base.metadata.get("license_name") or licence
    link = base.metadata.get("license_link")
    named = f"[{name}]({link})" if link else _code(str(name))
    return f"The base model's licence, {named}, holds for this model, too."


_LIMITS = """## Limits

**Erasure is not a guarantee.**

* Other words for the same thing, other languages, embeddings, input images or fine-tuning can bring a concept back.
* Training to forget changes other pictures, too, mostly of what is close to the concepts.
* The base model still has the concepts, and whoever has it needs no way around.
* All other limits and biases of the base model are in this one.

Use it as one layer of several, and look at what it draws in your own use before you rely on it."""


def _listed(names: list[str], most: int) -> str:
    shown = " ".join(", ".join(names[:most]).split())
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _argument(value: Any) -> str:
    return _listed([str(item) for item in value], MOST_CONCEPTS) if isinstance(value, list) else str(value)


def _code(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = " ".join(text.split())
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (text.count("`") + 1)
    return f"{fence} {text} {fence}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
