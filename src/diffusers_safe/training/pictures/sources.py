"""Decoded and cropped images of each optimizer step, in an order that depends only on the seed.

For a dataset with random access, a sample is a function of (seed, step, slot). It does not depend on the number of
processes, the batch size, accumulation, resuming or the number of workers. A stream is split between the processes, so
its samples depend on the number of processes. A resumed run continues a stream at the exact sample.
"""

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from ...diffusion.generators import sample_generator
from ...diffusion.sample_order import CANDIDATES, EpochOrder, choose_caption, picture_generator
from ..resumable import Resumable
from .dataset import CaptionedImages, describe_dropped
from .images import Picture, Preprocessing, UnreadableImage, decode_image


@dataclass
class PictureBatch:
    """A batch of [`PictureSource`].

    Attributes:
        pixel_values (`torch.Tensor`): `(B, 3, resolution, resolution)`, float32, in [-1, 1].
        captions (`list[str]`): B captions.
        original_sizes (`torch.Tensor`): `(B, 2)`, height and width before resizing.
        crop_top_lefts (`torch.Tensor`): `(B, 2)`, offsets of the crops in the resized images.
    """

    pixel_values: torch.Tensor
    captions: list[str]
    original_sizes: torch.Tensor
    crop_top_lefts: torch.Tensor


@dataclass
class Skipped:
    """The data that was not used.

    Attributes:
        unreadable (`dict[str, str]`): Names of images that could not be decoded, with the reason.
        dropped (`Counter[str]`): Number of rows that were dropped because of their captions, by reason.
    """

    unreadable: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """A summary in one line; `""` if nothing was skipped."""
        parts = [f"dropped: {describe_dropped(self.dropped)}"] if self.dropped else []
        if self.unreadable:
            name, reason = next(iter(self.unreadable.items()))
            number = len(self.unreadable)
            parts.append(f"{number:,} image{'s' if number > 1 else ''} cannot be read, the first {name} ({reason})")
        return "; ".join(parts)


class PictureSource(Resumable):
    """The images of each optimizer step. The state is part of every checkpoint.

    Images are prefetched in threads, because PIL releases Python's global interpreter lock while it decodes.

    Args:
        data (`CaptionedImages`): The dataset, from [`open_dataset`].
        preprocessing (`Preprocessing`): Converts an image to a tensor.
        seed (`int`): Seed of the order, the crops, flips and captions.
        samples_a_step (`int`): Number of samples per step, of all processes together.
        num_workers (`int`, defaults to 0): Number of threads for prefetching; 0 decodes without prefetching.
        proportion_empty_prompts (`float`, defaults to 0.0): Share of samples whose caption is replaced by `""`.
    """

    def __init__(
        self,
        data: CaptionedImages,
        preprocessing: Preprocessing,
        seed: int,
        samples_a_step: int,
        num_workers: int = 0,
        proportion_empty_prompts: float = 0.0,
    ):
        self.data, self.preprocessing, self.seed, self.samples_a_step = data, preprocessing, seed, samples_a_step
        self.num_workers, self.proportion_empty_prompts = num_workers, proportion_empty_prompts
        self._pool = ThreadPoolExecutor(num_workers, "pictures") if num_workers else _SynchronousExecutor()
        self._skipped = Skipped()

    @abstractmethod
    def batch(self, step: int, slots: range) -> PictureBatch:
        """Loads the images of a step.

        Args:
            step (`int`): Step, counted from 0. A stream returns the next images for any step, so steps must be
                requested in order.
            slots (`range`): Positions of the samples among the `samples_a_step` of all processes.

        Raises:
            `ValueError`: If no image can be read.
        """

    @abstractmethod
    def skipped(self) -> Skipped:
        """The data that was skipped so far by all processes. Must be called on every process."""

    def _prefetch_size(self, batch_size: int) -> int:
        """Number of images to prefetch: at least the next batch, and enough to keep all workers busy."""
        return max(batch_size, 2 * self.num_workers) if self.num_workers else 0

    def _make(self, row: dict[str, Any], number: int) -> "_Sample":
        """The sample with this number, from this row."""
        generator = picture_generator(self.seed, number)
        caption = choose_caption(self.data.captions_of(row), generator, self.proportion_empty_prompts)
        return _Sample(self.preprocessing(decode_image(self.data.image_of(row)), generator), caption)


@dataclass
class _Sample:
    picture: Picture
    caption: str


def _stack(samples: list[_Sample]) -> PictureBatch:
    pictures = [sample.picture for sample in samples]
    return PictureBatch(
        torch.stack([picture.pixel_values for picture in pictures]),
        [sample.caption for sample in samples],
        torch.tensor([picture.original_size for picture in pictures]),
        torch.tensor([picture.crop_top_left for picture in pictures]),
    )


class _SynchronousExecutor(Executor):
    """Runs each function immediately, in the calling thread."""

    def submit(self, function, *args):
        done = Future()
        try:
            done.set_result(function(*args))
        except Exception as error:  # raised by `result()`, as with other executors
            done.set_exception(error)
        return done


class ShuffledPictures(PictureSource):
    """The images of a dataset with random access: every row once per epoch, see [`EpochOrder`]."""

    def __init__(self, data: CaptionedImages, preprocessing: Preprocessing, seed: int, *args, **kwargs):
        super().__init__(data, preprocessing, seed, *args, **kwargs)
        self.order = EpochOrder(len(data), seed)
        self._loading: dict[int, Future] = {}

    def batch(self, step: int, slots: range) -> PictureBatch:
        numbers = [step * self.samples_a_step + slot for slot in slots]
        wanted = [*numbers, *islice(self._following(step, slots), self._prefetch_size(len(slots)))]
        self._loading = {n: self._loading.get(n) or self._pool.submit(self._load, n) for n in wanted}
        loaded = [self._loading.pop(number).result() for number in numbers]
        for _, unreadable in loaded:
            self._skipped.unreadable |= unreadable
        return _stack([sample for sample, _ in loaded])

    def _following(self, step: int, slots: range) -> Iterator[int]:
        """The numbers of the samples of this process after these."""
        stride = len(slots) * PartialState().num_processes
        first = slots.start
        while True:
            first += stride
            if first >= self.samples_a_step:
                step, first = step + 1, first % stride
            yield from range(step * self.samples_a_step + first, step * self.samples_a_step + first + len(slots))

    def _load(self, number: int) -> tuple[_Sample, dict[str, str]]:
        unreadable = {}
        for place in self.order.candidates(number):
            try:
                return self._make(self.data.row(place), number), unreadable
            except UnreadableImage as error:
                unreadable[self.data.name(place)] = str(error)
        raise ValueError(f"{CANDIDATES} images in a row cannot be read; {Skipped(unreadable)}")

    def prepare(self) -> None:
        """Does nothing: the first batch determines which images are prefetched."""

    def state_dict(self) -> dict:
        return {"unreadable": self.skipped().unreadable}

    def load_state_dict(self, state: dict) -> None:
        self._skipped.unreadable = dict(state.get("unreadable", {}))

    def skipped(self) -> Skipped:
        every = gather_object([self._skipped.unreadable])
        return Skipped({name: reason for own in every for name, reason in own.items()}, self.data.dropped)


class StreamedPictures(PictureSource):
    """The images of a stream. Each process reads its own part, and shuffles its files and the rows of each block.

    A block has `shuffle_buffer` rows, which are shuffled together. A checkpoint therefore only needs the start of the
    block and the number of rows that were taken from it. The shuffle buffer of `datasets` could not be restored.

    Args:
        shuffle_buffer (`int`, defaults to 1000): Rows per block. Two blocks are in memory, undecoded.

    The other arguments are those of [`PictureSource`].
    """

    def __init__(self, data: CaptionedImages, *args, shuffle_buffer: int = 1000, **kwargs):
        super().__init__(data, *args, **kwargs)
        process = PartialState()
        self._rank, self._world = process.process_index, process.num_processes
        self._rows = split_dataset_by_node(data.rows, rank=self._rank, world_size=self._world)
        self.shuffle_buffer = shuffle_buffer
        self._position = {"epoch": 0, "block": 0, "stream": None, "taken": 0}
        self._rows_to_come: Iterator[_StreamRow] | None = None
        self._pending: deque[tuple[_StreamRow, Future]] = deque()

    def batch(self, step: int, slots: range) -> PictureBatch:
        self.prepare()
        samples, unreadable, epoch = [], {}, self._position["epoch"]
        while len(samples) < len(slots):
            while len(self._pending) <= self._prefetch_size(len(slots)):
                coming = next(self._rows_to_come)
                self._pending.append((coming, self._pool.submit(self._load, coming)))
            coming, loading = self._pending.popleft()
            self._position = coming.position
            if coming.position["epoch"] > epoch + 1:  # a whole epoch without a usable row
                raise ValueError(f"no image of the stream is left; {self._skipped}")
            try:
                samples.append(loading.result())
                unreadable, epoch = {}, coming.position["epoch"]
            except _Dropped as dropped:
                self._skipped.dropped[str(dropped)] += 1
            except UnreadableImage as error:
                unreadable[self.data.file_name_of(coming.row) or f"row {coming.number}"] = str(error)
                self._skipped.unreadable |= unreadable
                if len(unreadable) == CANDIDATES:
                    raise ValueError(f"{CANDIDATES} images in a row cannot be read; {self._skipped}") from None
        return _stack(samples)

    def _load(self, coming: "_StreamRow") -> _Sample:
        if reason := self.data.reason_to_drop(self.data.captions_of(coming.row)):
            raise _Dropped(reason)
        return self._make(coming.row, coming.number)

    def prepare(self) -> None:
        if self._rows_to_come is None:
            self._rows_to_come = self._read(self._position)

    def _read(self, position: dict) -> Iterator["_StreamRow"]:
        """All rows from a position on, in shuffled order. The next block is read in the background."""
        blocks = _Blocks(self._rows, self.seed, self.shuffle_buffer, position)
        reader = ThreadPoolExecutor(1, "stream") if self.num_workers else _SynchronousExecutor()
        taken, (start, rows) = position["taken"], blocks.read()
        while True:
            following = reader.submit(blocks.read)
            number = start["block"] * self._world + self._rank
            order = torch.randperm(len(rows), generator=sample_generator(self.seed, "block", number)).tolist()
            for place in range(taken, len(rows)):
                yield _StreamRow(
                    rows[order[place]], {**start, "taken": place + 1}, number * self.shuffle_buffer + place
                )
            taken, (start, rows) = 0, following.result()

    def state_dict(self) -> dict:
        skipped = {"unreadable": self._skipped.unreadable, "dropped": dict(self._skipped.dropped)}
        return {"streams": gather_object([{**self._position, "skipped": skipped}])}

    def load_state_dict(self, state: dict) -> None:
        if len(state["streams"]) != self._world:
            raise ValueError(
                f"resume_from_checkpoint: a stream needs as many processes as the stopped run: "
                f"{len(state['streams'])} then, {self._world} now"
            )
        self._position = dict(state["streams"][self._rank])
        skipped = self._position.pop("skipped")
        self._skipped = Skipped(dict(skipped["unreadable"]), Counter(skipped["dropped"]))
        self._rows_to_come = None
        self._pending.clear()

    def skipped(self) -> Skipped:
        merged = Skipped()
        for own in gather_object([self._skipped]):
            merged.unreadable |= own.unreadable
            merged.dropped += own.dropped
        return merged


class _Dropped(Exception):
    """Raised for a row that is dropped because of its captions."""


@dataclass
class _StreamRow:
    """A row of a stream, the position of the stream after it, and its number."""

    row: dict[str, Any]
    position: dict
    number: int


class _Blocks:
    """Reads a stream block by block, epoch after epoch, and records where each block starts."""

    def __init__(self, stream: IterableDataset, seed: int, size: int, position: dict):
        self.stream, self.seed, self.size, self.block = stream, seed, size, position["block"]
        self._begin(position["epoch"], position["stream"])

    def _begin(self, epoch: int, state: dict | None = None) -> None:
        self.epoch, self._untouched = epoch, state is None
        # Any epoch except 0 shuffles the files, in the same way on all processes.
        number = 1 + int(torch.randint(2**31, (), generator=sample_generator(self.seed, "files", epoch)))
        self.stream.set_epoch(number)
        if state is not None:
            self.stream.load_state_dict(state)
        self._rows = iter(self.stream)

    def read(self) -> tuple[dict, list[dict]]:
        """The position of the next block, and its rows."""
        while True:
            start = {
                "epoch": self.epoch,
                "block": self.block,
                "stream": None if self._untouched else self.stream.state_dict(),
            }
            if rows := list(islice(self._rows, self.size)):
                self.block, self._untouched = self.block + 1, False
                return start, rows
            if self._untouched:
                raise ValueError("the stream has no rows for this process")
            self._begin(self.epoch + 1)


def make_pictures(data: CaptionedImages, *args, **kwargs) -> PictureSource:
    """Creates the source for the data; the arguments are those of [`PictureSource`]."""
    return (StreamedPictures if data.streaming else ShuffledPictures)(data, *args, **kwargs)
