"""The pictures of each optimizer step, decoded and cropped, in an order that depends on the seed alone.

Of a dataset with random access, a sample is a function of (seed, step, slot): the number of processes, the batch size,
accumulation, resuming and the number of workers change none. Of a stream, each process has a part of its own, so there
the number of processes counts; a resumed run continues where the stopped one was, to the sample.
"""

from abc import ABC, abstractmethod
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
from .dataset import CaptionedImages, told
from .images import Picture, Preprocessing, UnreadableImage, decode_image


@dataclass
class PictureBatch:
    """What [`PictureSource.batch`] gives.

    Attributes:
        pixel_values (`torch.Tensor`): `(B, 3, resolution, resolution)`, float32, in [-1, 1].
        captions (`list[str]`): B captions.
        original_sizes (`torch.Tensor`): `(B, 2)`, height and width of the file's picture.
        crop_top_lefts (`torch.Tensor`): `(B, 2)`, where the crop begins in the resized picture.
    """

    pixel_values: torch.Tensor
    captions: list[str]
    original_sizes: torch.Tensor
    crop_top_lefts: torch.Tensor


@dataclass
class Skipped:
    """What was not used.

    Attributes:
        unreadable (`dict[str, str]`): Pictures that could not be decoded, and why.
        dropped (`Counter[str]`): Rows that were left out because of their captions, by reason.
    """

    unreadable: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """One line; empty if nothing was skipped."""
        parts = [f"dropped: {told(self.dropped)}"] if self.dropped else []
        if self.unreadable:
            name, reason = next(iter(self.unreadable.items()))
            number = len(self.unreadable)
            parts.append(f"{number:,} picture{'s' if number > 1 else ''} cannot be read, the first {name} ({reason})")
        return "; ".join(parts)


class PictureSource(ABC):
    """Gives the pictures of each optimizer step; a part of every checkpoint.

    Pictures are decoded ahead of the step that needs them, in threads: PIL lets go of Python's lock while it works.

    Args:
        data (`CaptionedImages`): From [`open_dataset`].
        preprocessing (`Preprocessing`): From an image to a tensor.
        seed (`int`): Every draw follows from it.
        samples_a_step (`int`): Of all processes together.
        num_workers (`int`, defaults to 0): Threads that decode ahead; 0 decodes when a batch is asked for.
        proportion_empty_prompts (`float`, defaults to 0.0): Share of samples that get `""` for a caption.
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
        self._pool = ThreadPoolExecutor(num_workers, "pictures") if num_workers else _AtOnce()
        self._skipped = Skipped()

    @abstractmethod
    def batch(self, step: int, slots: range) -> PictureBatch:
        """The pictures of a step, counted from 0, at these places among `samples_a_step`. Of a stream they are the
        next ones, whatever the step, so it is asked in order.

        Raises:
            `ValueError`: If no picture can be read.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Begins to read, if it reads ahead."""

    @abstractmethod
    def state_dict(self) -> dict:
        """What a resumed run could not know. Called on every process."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Continues from a `state_dict`."""

    @abstractmethod
    def skipped(self) -> Skipped:
        """What was not used so far, by all processes. Called on every process."""

    def _ahead(self, batch_size: int) -> int:
        """How many pictures are decoded ahead: of the next batch, and enough for all workers to have work."""
        return max(batch_size, 2 * self.num_workers) if self.num_workers else 0

    def _make(self, row: dict[str, Any], number: int) -> "_Sample":
        """A sample of this row, with the draws of this number."""
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


class _AtOnce(Executor):
    """Does the work when it is given, in the same thread."""

    def submit(self, function, *args):
        done = Future()
        try:
            done.set_result(function(*args))
        except Exception as error:  # it is raised where the result is asked for, as by other executors
            done.set_exception(error)
        return done


class ShuffledPictures(PictureSource):
    """Of a dataset with random access: every row once an epoch, see [`EpochOrder`]."""

    def __init__(self, data: CaptionedImages, preprocessing: Preprocessing, seed: int, *args, **kwargs):
        super().__init__(data, preprocessing, seed, *args, **kwargs)
        self.order = EpochOrder(len(data), seed)
        self._loading: dict[int, Future] = {}

    def batch(self, step: int, slots: range) -> PictureBatch:
        numbers = [step * self.samples_a_step + slot for slot in slots]
        wanted = [*numbers, *islice(self._following(step, slots), self._ahead(len(slots)))]
        self._loading = {n: self._loading.get(n) or self._pool.submit(self._load, n) for n in wanted}
        loaded = [self._loading.pop(number).result() for number in numbers]
        for _, unreadable in loaded:
            self._skipped.unreadable |= unreadable
        return _stack([sample for sample, _ in loaded])

    def _following(self, step: int, slots: range) -> Iterator[int]:
        """The numbers of the samples that this process will want after these."""
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
        raise ValueError(f"{CANDIDATES} pictures in a row cannot be read; {Skipped(unreadable)}")

    def prepare(self) -> None:
        """Nothing: the first batch says which pictures are needed."""

    def state_dict(self) -> dict:
        return {"unreadable": self.skipped().unreadable}

    def load_state_dict(self, state: dict) -> None:
        self._skipped.unreadable = dict(state.get("unreadable", {}))

    def skipped(self) -> Skipped:
        every = gather_object([self._skipped.unreadable])
        return Skipped({name: reason for own in every for name, reason in own.items()}, self.data.dropped)


class StreamedPictures(PictureSource):
    """Of a stream: each process has a part of it, and shuffles the order of its files and the rows of each block.

    A block is as many rows as `shuffle_buffer`, whose order is drawn. So a checkpoint needs to know only where the
    block begins and how many of it were taken; `datasets`' own shuffle buffer would be lost.

    Args:
        shuffle_buffer (`int`, defaults to 1000): Rows of a block. Two blocks are in memory, undecoded.

    The others are those of [`PictureSource`].
    """

    def __init__(self, data: CaptionedImages, *args, shuffle_buffer: int = 1000, **kwargs):
        super().__init__(data, *args, **kwargs)
        process = PartialState()
        self._rank, self._world = process.process_index, process.num_processes
        self._rows = split_dataset_by_node(data.rows, rank=self._rank, world_size=self._world)
        self.shuffle_buffer = shuffle_buffer
        self._position = {"epoch": 0, "block": 0, "stream": None, "taken": 0}
        self._coming: Iterator[_Coming] | None = None
        self._pending: deque[tuple[_Coming, Future]] = deque()

    def batch(self, step: int, slots: range) -> PictureBatch:
        self.prepare()
        samples, unreadable, epoch = [], {}, self._position["epoch"]
        while len(samples) < len(slots):
            while len(self._pending) <= self._ahead(len(slots)):
                coming = next(self._coming)
                self._pending.append((coming, self._pool.submit(self._load, coming)))
            coming, loading = self._pending.popleft()
            self._position = coming.position
            if coming.position["epoch"] > epoch + 1:  # a whole epoch without one
                raise ValueError(f"no picture of the stream is left; {self._skipped}")
            try:
                samples.append(loading.result())
                unreadable, epoch = {}, coming.position["epoch"]
            except _Dropped as dropped:
                self._skipped.dropped[str(dropped)] += 1
            except UnreadableImage as error:
                unreadable[self.data.file_name_of(coming.row) or f"row {coming.number}"] = str(error)
                self._skipped.unreadable |= unreadable
                if len(unreadable) == CANDIDATES:
                    raise ValueError(f"{CANDIDATES} pictures in a row cannot be read; {self._skipped}") from None
        return _stack(samples)

    def _load(self, coming: "_Coming") -> _Sample:
        if reason := self.data.reason_to_drop(self.data.captions_of(coming.row)):
            raise _Dropped(reason)
        return self._make(coming.row, coming.number)

    def prepare(self) -> None:
        if self._coming is None:
            self._coming = self._read(self._position)

    def _read(self, position: dict) -> Iterator["_Coming"]:
        """All rows from a position on, in the order in which they are taken. The next block is read meanwhile."""
        blocks = _Blocks(self._rows, self.seed, self.shuffle_buffer, position)
        reader = ThreadPoolExecutor(1, "stream") if self.num_workers else _AtOnce()
        taken, (start, rows) = position["taken"], blocks.read()
        while True:
            following = reader.submit(blocks.read)
            number = start["block"] * self._world + self._rank
            order = torch.randperm(len(rows), generator=sample_generator(self.seed, "block", number)).tolist()
            for place in range(taken, len(rows)):
                yield _Coming(rows[order[place]], {**start, "taken": place + 1}, number * self.shuffle_buffer + place)
            taken, (start, rows) = 0, following.result()

    def state_dict(self) -> dict:
        skipped = {"unreadable": self._skipped.unreadable, "dropped": dict(self._skipped.dropped)}
        return {"streams": gather_object([{**self._position, "skipped": skipped}])}

    def load_state_dict(self, state: dict) -> None:
        if len(state["streams"]) != self._world:
            raise ValueError(
                f"resume_from_checkpoint: a stream is continued by as many processes as read it: "
                f"{len(state['streams'])} there, {self._world} here"
            )
        self._position = dict(state["streams"][self._rank])
        skipped = self._position.pop("skipped")
        self._skipped = Skipped(dict(skipped["unreadable"]), Counter(skipped["dropped"]))
        self._coming = None
        self._pending.clear()

    def skipped(self) -> Skipped:
        merged = Skipped()
        for own in gather_object([self._skipped]):
            merged.unreadable |= own.unreadable
            merged.dropped += own.dropped
        return merged


class _Dropped(Exception):
    """A row that is left out because of its captions."""


@dataclass
class _Coming:
    """A row of a stream, where the stream is once it is taken, and a number of its own."""

    row: dict[str, Any]
    position: dict
    number: int


class _Blocks:
    """Reads a stream block by block, epoch after epoch, and knows where each block begins."""

    def __init__(self, stream: IterableDataset, seed: int, size: int, position: dict):
        self.stream, self.seed, self.size, self.block = stream, seed, size, position["block"]
        self._begin(position["epoch"], position["stream"])

    def _begin(self, epoch: int, state: dict | None = None) -> None:
        self.epoch, self._untouched = epoch, state is None
        # Any number but 0 shuffles the files, alike on all processes.
        number = 1 + int(torch.randint(2**31, (), generator=sample_generator(self.seed, "files", epoch)))
        self.stream.set_epoch(number)
        if state is not None:
            self.stream.load_state_dict(state)
        self._rows = iter(self.stream)

    def read(self) -> tuple[dict, list[dict]]:
        """Where a block begins, and its rows."""
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
    """The source that fits the data; its arguments are those of [`PictureSource`]."""
    return (StreamedPictures if data.streaming else ShuffledPictures)(data, *args, **kwargs)
