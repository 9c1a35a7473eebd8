"""A learned token: the file that `load_textual_inversion` takes, and a pipeline to which it is added temporarily."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..families import families, family_of_pipeline
from ..files import save_tensors


TOKEN_NAME = "learned_embeds.safetensors"  # what diffusers looks for in a folder
_METADATA = "diffusers-safe"


def text_parts(pipeline: DiffusionPipeline) -> dict[str, tuple[PreTrainedTokenizerBase, PreTrainedModel]]:
    """The tokenizers and text encoders of a pipeline, in pairs, by the tokenizer's name."""
    return family_of_pipeline(pipeline).text_parts(pipeline)


def save_token(
    path: str | Path, token: str, vectors: list[torch.Tensor], identity: dict, names: tuple[str, ...] = ()
) -> None:
    """Writes a textual inversion, whole or not at all.

    Of one text encoder the file holds `{token: (width,)}`; of several `{name: (1, width), ...}`.

    Args:
        path (`str` or `Path`): A `.safetensors` file.
        token (`str`): The word.
        vectors (`list[torch.Tensor]`): `(width,)` for each text encoder.
        identity (`dict`): What it was learned from; recorded in the file's metadata.
        names (`tuple[str, ...]`, *optional*): The family's `token_names`, of several text encoders.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [vector.detach().float().cpu().contiguous() for vector in vectors]
    tensors = {token: plain[0]} if len(plain) == 1 else dict(zip(names, (vector[None] for vector in plain)))
    # One entry: several come in an order of chance, and equal runs give equal files.
    save_tensors(tensors, path, {_METADATA: json.dumps({"token": token, "identity": identity}, sort_keys=True)})


def read_token(path: str | Path) -> tuple[str, list[torch.Tensor], dict]:
    """What [`save_token`] wrote: the word, the vectors, the identity.

    Raises:
        `ValueError`: If it is another file.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[_METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        token, identity = facts["token"], facts["identity"]
        names = [token] if token in tensors else _encoder_names(tensors)
        return token, [tensors[name].reshape(-1) for name in names], identity
    except (OSError, SafetensorError, KeyError, StopIteration, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no learned token of ours ({error}); delete it to learn anew") from None


def _encoder_names(tensors: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """The names in the order of the pipeline's text encoders."""
    return next(family.token_names for family in families() if set(family.token_names) == tensors.keys())


@contextmanager
def added_token(pipeline: DiffusionPipeline, token: str, vectors: list[torch.Tensor]) -> Iterator[None]:
    """A pipeline with one more word; tokenizers and text encoders are as before afterwards, to the bit.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Of a family of `families`.
        token (`str`): The word, which its tokenizers do not know.
        vectors (`list[torch.Tensor]`): `(width,)` for each of its text encoders.

    Raises:
        `ValueError`: If a tokenizer knows the word, or a vector has another width.
    """
    parts = text_parts(pipeline)
    kept = [_Kept(name, *pair) for name, pair in parts.items()]
    try:
        for (name, (tokenizer, encoder)), vector in zip(parts.items(), vectors, strict=True):
            tokenizer = deepcopy(tokenizer)
            setattr(pipeline, name, tokenizer)
            _add(token, vector, tokenizer, encoder)
        yield
    finally:
        for one in kept:
            one.put_back(pipeline)


@torch.no_grad()
def _add(token: str, vector: torch.Tensor, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel) -> None:
    # Like diffusers' `load_textual_inversion`, which Stable Diffusion 3's pipelines do not have.
    rows, width = encoder.get_input_embeddings().weight.shape
    if vector.shape != (width,):
        raise ValueError(f"token {token}: its vector has the shape {tuple(vector.shape)}, the text encoder ({width},)")
    if token in tokenizer.get_vocab():
        raise ValueError(f"token {token}: the tokenizer knows it already")
    tokenizer.add_tokens(token)
    encoder.resize_token_embeddings(max(rows, len(tokenizer)), mean_resizing=False)
    encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = vector.detach().to(encoder.dtype)


class _Kept:
    """A tokenizer and the embeddings of its text encoder, before a word is added."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel):
        self.name, self.tokenizer, self.encoder = name, tokenizer, encoder
        self.embedding: nn.Embedding = encoder.get_input_embeddings()
        # transformers gives the same module another tensor; this one is not written to.
        self.weight, self.vocab_size = self.embedding.weight.data, encoder.config.vocab_size

    def put_back(self, pipeline: DiffusionPipeline) -> None:
        setattr(pipeline, self.name, self.tokenizer)
        self.embedding.weight.data = self.weight
        self.embedding.num_embeddings = len(self.weight)
        self.encoder.set_input_embeddings(self.embedding)
        self.encoder.config.vocab_size = self.vocab_size
