"""Latents and conditioning of each optimizer step.

[`EncodedLatents`] encodes images and captions during training, [`CachedLatents`] reads them from a cache. Both use
the same captions, flips and noise for a sample, so a run is the same with either, up to the rounding of the cache.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch

from ...diffusion.generators import sample_generator
from ...diffusion.sample_order import CANDIDATES, EpochOrder, choose_caption, picture_generator
from ...families import Conditioning, ModelFamily
from ..resumable import Resumable
from .latent_cache import LatentCache
from .sources import PictureSource, Skipped


@dataclass
class LatentBatch:
    """A batch of [`LatentSource`], on its device.

    Attributes:
        latents (`torch.Tensor`): `(B, C, H, W)`, float32, scaled for the denoiser, without noise.
        conditioning (`Conditioning`): Conditioning on the captions and the sizes of the images, float32.
        captions (`list[str]`): B captions.
    """

    latents: torch.Tensor
    conditioning: Conditioning
    captions: list[str]


class LatentSource(Resumable):
    """The latents of each optimizer step. The state is part of every checkpoint.

    Args:
        family (`ModelFamily`): The model whose autoencoder and text encoders are used.
        seed (`int`): Seed of all random numbers.
        samples_a_step (`int`): Number of samples per step, of all processes together.
        device (`torch.device`, defaults to `"cpu"`): Device of the batches.
    """

    def __init__(self, family: ModelFamily, seed: int, samples_a_step: int, device: torch.device | str = "cpu"):
        self.family, self.seed, self.samples_a_step, self.device = family, seed, samples_a_step, device

    @property
    @abstractmethod
    def identity(self) -> str:
        """The fingerprint of the data, independent of where it lies; `"a stream"` for streams, which are not read in
        advance."""

    @abstractmethod
    def batch(self, step: int, slots: range) -> LatentBatch:
        """The latents of a step, counted from 0, for these positions among `samples_a_step`. Each time an image is
        used, its latents are sampled again."""

    @abstractmethod
    def skipped(self) -> Skipped:
        """The data that was skipped so far by all processes. Must be called on every process."""

    def _draw_latents(self, moments: torch.Tensor, step: int, slots: range) -> torch.Tensor:
        numbers = [step * self.samples_a_step + slot for slot in slots]
        generators = [sample_generator(self.seed, "latents", number) for number in numbers]
        return self.family.draw_latents(moments, generators)


class EncodedLatents(LatentSource):
    """Encodes images and captions during training.

    Args:
        pictures (`PictureSource`): Source of the images, from [`make_pictures`].

    The other arguments are those of [`LatentSource`].
    """

    def __init__(self, pictures: PictureSource, family: ModelFamily, device: torch.device | str = "cpu"):
        super().__init__(family, pictures.seed, pictures.samples_a_step, device)
        self.pictures = pictures

    @property
    def identity(self) -> str:
        data = self.pictures.data
        return "a stream" if data.streaming else data.fingerprint()

    def batch(self, step: int, slots: range) -> LatentBatch:
        pictures = self.pictures.batch(step, slots)
        moments = self.family.encode_pictures(pictures.pixel_values, self.device)
        conditioning = self.family.encode(pictures.captions, self.device, truncation=True)
        conditioning = self.family.with_sizes(conditioning, pictures.original_sizes, pictures.crop_top_lefts)
        conditioning = {name: value.float() for name, value in conditioning.items()}
        return LatentBatch(self._draw_latents(moments, step, slots), conditioning, pictures.captions)

    def prepare(self) -> None:
        """Moves autoencoder and text encoders to the device, and starts to read."""
        for encoder in self.family.encoders.values():
            encoder.to(self.device)
        self.pictures.prepare()

    def state_dict(self) -> dict:
        return self.pictures.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.pictures.load_state_dict(state)

    def skipped(self) -> Skipped:
        return self.pictures.skipped()


class CachedLatents(LatentSource):
    """Reads latents and text embeddings from a cache, without running autoencoder and text encoders.

    Args:
        cache (`LatentCache`): The cache; `prepare` builds it if necessary.
        proportion_empty_prompts (`float`, defaults to 0.0): Share of samples whose caption is replaced by `""`.
        num_workers (`int`, defaults to 0): Number of threads that decode images for the cache.

    The other arguments are those of [`LatentSource`].
    """

    def __init__(
        self,
        cache: LatentCache,
        seed: int,
        samples_a_step: int,
        device: torch.device | str = "cpu",
        proportion_empty_prompts: float = 0.0,
        num_workers: int = 0,
    ):
        super().__init__(cache.family, seed, samples_a_step, device)
        self.cache, self.proportion_empty_prompts, self.num_workers = cache, proportion_empty_prompts, num_workers
        self.order = EpochOrder(len(cache.data), seed)

    @property
    def identity(self) -> str:
        return self.cache.identity["data"]

    def batch(self, step: int, slots: range) -> LatentBatch:
        places, captions, flips = zip(*(self._choose(step * self.samples_a_step + slot) for slot in slots))
        moments = self.cache.moments(places, flips).to(self.device)
        conditioning = self.cache.conditioning(captions)
        conditioning = {name: value.to(self.device).float() for name, value in conditioning.items()}
        sizes = (values[list(places)] for values in (self.cache.original_sizes, self.cache.crop_top_lefts))
        conditioning = self.family.with_sizes(conditioning, *sizes)
        return LatentBatch(self._draw_latents(moments, step, slots), conditioning, list(captions))

    def _choose(self, number: int) -> tuple[int, str, bool]:
        """The position of the image of a sample, its caption, and whether it is flipped."""
        place = next((place for place in self.order.candidates(number) if self.cache.readable[place]), None)
        if place is None:
            raise ValueError(f"{CANDIDATES} images in a row cannot be read; {self.skipped()}")
        generator = picture_generator(self.seed, number)
        caption = choose_caption(self.cache.data.captions(place), generator, self.proportion_empty_prompts)
        return place, caption, self.cache.preprocessing.draw_flip(generator)

    def prepare(self) -> None:
        """Builds the missing part of the cache."""
        self.cache.build(self.device, num_workers=self.num_workers)

    def state_dict(self) -> dict:
        """Empty: the cache is on disk."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Does nothing."""

    def skipped(self) -> Skipped:
        return Skipped(dict(self.cache.unreadable), self.cache.data.dropped)
