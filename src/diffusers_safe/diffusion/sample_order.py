"""Which row a sample takes, and what is sampled for it: functions of the seed and the sample's number.

A sample's number is `step * samples_a_step + slot`, its place among all samples of a run.
"""

from collections.abc import Iterator

import torch

from .generators import sample_generator


CANDIDATES = 100  # so many rows in a row are not unreadable by chance


class EpochOrder:
    """Every row once per epoch, in a different order each epoch.

    Args:
        length (`int`): How many rows there are.
        seed (`int`): Seed of the orders.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._epochs: dict[int, torch.Tensor] = {}

    def candidates(self, number: int) -> Iterator[int]:
        """The row of a sample, then the rows that replace it, in turn, if it cannot be read."""
        epoch, place = divmod(number, self.length)
        yield int(self._epoch(epoch)[place])
        generator = sample_generator(self.seed, "replacement", number)
        for _ in range(CANDIDATES - 1):
            yield int(torch.randint(self.length, (), generator=generator))

    def _epoch(self, epoch: int) -> torch.Tensor:
        if epoch not in self._epochs:
            order = torch.randperm(self.length, generator=sample_generator(self.seed, "epoch", epoch))
            # A batch may reach into the next epoch, so two are kept.
            self._epochs = {e: kept for e, kept in self._epochs.items() if abs(e - epoch) == 1} | {epoch: order}
        return self._epochs[epoch]


def picture_generator(seed: int, number: int) -> torch.Generator:
    """The generator of a sample's caption, crop and flip, in this order."""
    return sample_generator(seed, "picture", number)


def choose_caption(
    captions: list[str], generator: torch.Generator | None = None, proportion_empty_prompts: float = 0.0
) -> str:
    """One of an image's captions at random, the first without a generator; `""` in this share of the cases."""
    if generator is None:
        return captions[0]
    if proportion_empty_prompts and torch.rand((), generator=generator) < proportion_empty_prompts:
        return ""
    if len(captions) == 1:
        return captions[0]
    return captions[int(torch.randint(len(captions), (), generator=generator))]
