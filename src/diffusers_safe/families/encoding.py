"""Prompts as a family's denoiser reads them: encoded by the pipeline's own text encoders."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from diffusers import DiffusionPipeline

from .prompts import check_lengths, token_ids, unknown_words, warn_of_unknown_words


PROMPTS_AT_ONCE = 64  # where only their states are wanted
PROMPTS_OF_PIPELINES = 8  # where a pipeline keeps the hidden states of every layer
# What a denoiser needs to know of a prompt besides latents and timesteps: named tensors, the batch first.
Conditioning = dict[str, torch.Tensor]


class PromptEncoding(ABC):
    """The part of a [`ModelFamily`] that encodes prompts."""

    pipeline: DiffusionPipeline
    text_encoders: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    pooled_name: str | None = None

    def check_prompts(self, prompts: list[str]) -> None:
        """
        Raises:
            `ValueError`: If a prompt is longer than the text encoders take: what is cut would not be trained.
        """
        for name in self.tokenizers:
            check_lengths(prompts, getattr(self.pipeline, name))

    def warn_of_unknown_words(self, concepts: list[str], option: str = "concepts") -> None:
        """As [`warn_of_unknown_words`]."""
        warn_of_unknown_words(concepts, [getattr(self.pipeline, name) for name in self.tokenizers], option)

    @torch.no_grad()
    def encode(self, prompts: list[str], device: torch.device | str = "cpu", truncation: bool = False) -> Conditioning:
        """Encodes prompts on a device, without gradients; the encoders go back to where they were.

        Every tensor has batch size `len(prompts)`. `""` is the unconditional prompt: what the pipeline itself takes
        for guidance where no negative prompt is given. With `truncation`, prompts that are too long are cut, as
        captions of images are.

        Raises:
            `ValueError`: As [`~ModelFamily.check_prompts`].
        """
        if not truncation:
            self.check_prompts(prompts)
        encoders = [getattr(self.pipeline, name) for name in self.text_encoders]
        homes = [encoder.device for encoder in encoders]
        for encoder in encoders:
            encoder.to(device)
        with _silent(type(self.pipeline).__module__) if truncation else nullcontext():
            encoded = self._encode(prompts, device)
        for encoder, home in zip(encoders, homes):
            encoder.to(home)
        return encoded

    def text_states(
        self, prompts: list[str], device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompts as the denoiser reads them: the states of all their tokens, `(B, length, width)`, and the pooled
        ones, `(B, pooled width)`, if it takes any. `" "` is the encoded empty text, which the unconditional prompt
        `""` need not be."""
        batches = [prompts[i : i + PROMPTS_AT_ONCE] for i in range(0, len(prompts), PROMPTS_AT_ONCE)]
        encoded = [self.encode(batch, device) for batch in batches]
        tokens = torch.cat([batch["encoder_hidden_states"] for batch in encoded])
        if self.pooled_name not in encoded[0]:
            return tokens, None
        return tokens, torch.cat([batch[self.pooled_name] for batch in encoded])

    @property
    def sequences(self) -> dict[str, slice]:
        """The sequences of tokens that [`~ModelFamily.text_states`] consist of: tokenizer and place. Encoders whose
        states are joined along the width are one sequence."""
        return {self.tokenizers[0]: slice(None)}

    def token_sequences(self, prompts: list[str]) -> list[tuple[slice, list[list[int]]]]:
        """For each of [`~ModelFamily.sequences`] its place, and the ids of each prompt's tokens, with those of start
        and end of text and without padding."""
        tokenizers = {name: getattr(self.pipeline, name) for name in self.sequences}
        return [
            (place, [token_ids(prompt, tokenizers[name]) for prompt in prompts])
            for name, place in self.sequences.items()
        ]

    @torch.no_grad()
    def text_vectors(self, prompts: list[str]) -> torch.Tensor:
        """One vector for each prompt, `(B, width)`, by which meanings can be compared: the first text encoder's state
        of the end of text. Without padding, so it costs little."""
        tokenizer, encoder = getattr(self.pipeline, self.tokenizers[0]), getattr(self.pipeline, self.text_encoders[0])
        batch = tokenizer(prompts, padding=True, return_tensors="pt").to(encoder.device)
        states = encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return states[torch.arange(len(prompts)), batch.attention_mask.sum(dim=1) - 1].float().cpu()

    def known_words(self, words: list[str]) -> list[str]:
        """The words that a tokenizer of the model knows."""
        tokenizers = [getattr(self.pipeline, name) for name in self.tokenizers]
        return [word for word in words if any(not unknown_words(word, tokenizer) for tokenizer in tokenizers)]

    def whole_words(self, words: list[str]) -> list[str]:
        """The words that a tokenizer of the model takes as one token, which it does with frequent words."""
        tokenizers = [getattr(self.pipeline, name) for name in self.tokenizers]
        return [word for word in words if any(len(tokenizer.tokenize(word)) == 1 for tokenizer in tokenizers)]

    def known_forms(self, forms: Sequence[str]) -> list[str]:
        """The phrasings, such as `"a photo of {x}"`, whose own words the model knows."""
        return [form for form in forms if self.known_words([re.sub(r"\{\w\}", "", form)])]

    def encode_with_gradients(self, prompts: list[str], device: torch.device | str = "cpu") -> Conditioning:
        """The same through text encoders that are on the device already, for what is learned inside of them.

        Raises:
            `ValueError`: As [`~ModelFamily.check_prompts`].
        """
        self.check_prompts(prompts)
        return self._encode(prompts, device)

    @abstractmethod
    def _encode(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        """Encodes prompts that fit, with encoders that are on the device."""

    @staticmethod
    def encode_different(
        prompts: list[str], encode: Callable[[list[str]], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        """Encodes each different prompt once and a few at a time, for pipelines that keep the states of every layer;
        returns the tensors of `encode` for all prompts."""
        different, encoded = list(dict.fromkeys(prompts)), {}
        for i in range(0, len(different), PROMPTS_OF_PIPELINES):
            batch = different[i : i + PROMPTS_OF_PIPELINES]
            encoded |= zip(batch, zip(*encode(batch)))
        return tuple(torch.stack(tensors) for tensors in zip(*map(encoded.get, prompts)))


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without warnings from this logger: diffusers has one for every prompt that is cut."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
