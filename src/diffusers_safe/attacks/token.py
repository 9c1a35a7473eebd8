"""A learned token: the file that `load_textual_inversion` takes, and a pipeline that knows it for a while."""

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

from ..files import save_tensors


TOKEN_NAME = "learned_embeds.safetensors"  # what diffusers looks for in a folder
_TWO_ENCODERS = ("clip_l", "clip_g")  # names of SDXL's two in files of textual inversions
_METADATA = "diffusers-safe"
# Of the pipelines that learn a token: its tokenizers, each with the text encoder that belongs to it.
_PAIRS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


def text_parts(pipeline: DiffusionPipeline) -> list[tuple[PreTrainedTokenizerBase, PreTrainedModel]]:
    """The tokenizers and text encoders of a pipeline, in pairs."""
    return [tuple(getattr(pipeline, name) for name in names) for names in _pairs(pipeline)]


def _pairs(pipeline: DiffusionPipeline) -> list[tuple[str, str]]:
    return [names for names in _PAIRS if all(getattr(pipeline, name, None) is not None for name in names)]


def save_token(path: str | Path, token: str, vectors: list[torch.Tensor], identity: dict) -> None:
    """Writes a textual inversion, whole or not at all.

    Of one text encoder the file holds `{token: (width,)}`; of SDXL's two `{"clip_l": (1, width), "clip_g": ...}`.

    Args:
        path (`str` or `Path`): A `.safetensors` file.
        token (`str`): The word.
        vectors (`list[torch.Tensor]`): `(width,)` for each text encoder.
        identity (`dict`): What it was learned from; travels in the file's metadata.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [vector.detach().float().cpu().contiguous() for vector in vectors]
    tensors = {token: plain[0]} if len(plain) == 1 else dict(zip(_TWO_ENCODERS, (vector[None] for vector in plain)))
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
        names = [token] if token in tensors else _TWO_ENCODERS
        return token, [tensors[name].reshape(-1) for name in names], identity
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no learned token of ours ({error}); delete it to learn anew") from None


@contextmanager
def added_token(pipeline: DiffusionPipeline, token: str, vectors: list[torch.Tensor]) -> Iterator[None]:
    """A pipeline with one more word; tokenizers and text encoders are as before afterwards, to the bit.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): One that has `load_textual_inversion`.
        token (`str`): The word, which its tokenizers do not know.
        vectors (`list[torch.Tensor]`): `(width,)` for each of its text encoders.

    Raises:
        `ValueError`: If a tokenizer knows the word, or a vector has another width.
    """
    kept = [_Kept(pipeline, *names) for names in _pairs(pipeline)]
    try:
        for (name, _), (tokenizer, encoder), vector in zip(
            _pairs(pipeline), text_parts(pipeline), vectors, strict=True
        ):
            tokenizer = deepcopy(tokenizer)
            setattr(pipeline, name, tokenizer)
            pipeline.load_textual_inversion(
                vector.detach().cpu(), token=token, tokenizer=tokenizer, text_encoder=encoder
            )
        yield
    finally:
        for one in kept:
            one.put_back(pipeline)


class _Kept:
    """A tokenizer and the embeddings of its text encoder, before a word is added."""

    def __init__(self, pipeline: DiffusionPipeline, tokenizer: str, encoder: str):
        self.name, self.tokenizer = tokenizer, getattr(pipeline, tokenizer)
        self.encoder: PreTrainedModel = getattr(pipeline, encoder)
        self.embedding: nn.Embedding = self.encoder.get_input_embeddings()
        # transformers gives the same module another tensor; this one is not written to.
        self.weight, self.vocab_size = self.embedding.weight.data, self.encoder.config.vocab_size

    def put_back(self, pipeline: DiffusionPipeline) -> None:
        setattr(pipeline, self.name, self.tokenizer)
        self.embedding.weight.data = self.weight
        self.embedding.num_embeddings = len(self.weight)
        self.encoder.set_input_embeddings(self.embedding)
        self.encoder.config.vocab_size = self.vocab_size
