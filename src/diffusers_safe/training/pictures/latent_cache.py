"""`--cache_latents`: what autoencoder and text encoders make of a dataset, computed once and kept on disk.

In a folder, `cache.json` says what it was made of, `moments-*.safetensors` hold mean and log variance of the latents
of each picture (and of its mirror image, where pictures are flipped), `texts-*.safetensors` the text states of each
different caption and of `""`. A file is whole or absent, so a build that was killed goes on where it was.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ...families import Conditioning, ModelFamily
from ...files import save_tensors
from ...output_folders import claimed
from ...provenance import write_text
from .dataset import CaptionedImages
from .images import Picture, Preprocessing, UnreadableImage, decode_image


FILE_NAME = "cache.json"
ROWS_A_FILE = 512
# Rounds a latent by less than 1/2000 of its size; the least noise that Stable Diffusion trains with is 60 times that.
DTYPE = torch.float16


class LatentCache:
    """The cache of one dataset, one preprocessing and one model.

    Args:
        folder (`str` or `Path`): Where it is, or will be.
        data (`CaptionedImages`): Not a stream.
        preprocessing (`Preprocessing`): With a center crop, unless all pictures are square.
        family (`ModelFamily`): The model whose encoders are used.

    Attributes:
        captions (`dict[str, int]`): Every different caption, `""` the first, and its row.
        made_of (`dict`): What `cache.json` says.
        readable (`torch.Tensor`): `(N,)`, of each picture, as the two that follow; there once it is built.
        original_sizes (`torch.Tensor`): `(N, 2)`, height and width of the file's picture.
        crop_top_lefts (`torch.Tensor`): `(N, 2)`, where the crop begins in the resized picture.
        unreadable (`dict[str, str]`): Names of the others, and why.

    Raises:
        `ValueError`: If the folder holds the cache of something else, or the data is a stream.
    """

    def __init__(self, folder: str | Path, data: CaptionedImages, preprocessing: Preprocessing, family: ModelFamily):
        if data.streaming:
            raise ValueError("cache_latents: a stream cannot be cached; leave out --streaming")
        self.folder, self.data, self.preprocessing, self.family = Path(folder), data, preprocessing, family
        different = dict.fromkeys(caption for captions in data.all_captions() for caption in captions)
        self.captions = {caption: row for row, caption in enumerate(dict.fromkeys(["", *different]))}
        self.made_of = {
            **family.encoding_identity,
            "data": data.fingerprint(),
            "samples": len(data),
            **asdict(preprocessing),
        }
        self.key = hashlib.sha256(json.dumps(self.made_of).encode()).hexdigest()[:16]
        self._check()

    def _check(self) -> None:
        path = self.folder / FILE_NAME
        if not path.is_file():
            return
        there = _read_facts(path)
        if different := [name for name in {**there, **self.made_of} if there.get(name) != self.made_of.get(name)]:
            differences = ", ".join(
                f"{name} {there.get(name)} there, {self.made_of.get(name)} here" for name in different
            )
            raise ValueError(f"cache_latents {self.folder}: it was made of something else ({differences}); name "
                             "another folder with --cache_folder")  # fmt: skip

    # --- building ----------------------------------------------------------------------------------------------------

    def build(
        self,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        num_workers: int = 0,
        progress_bar: bool = True,
    ) -> None:
        """Encodes what is missing, and opens the cache. Every process encodes a part: call it on each.

        Args:
            device (`torch.device`): Where the encoders compute.
            batch_size (`int`, defaults to 8): Pictures at a time.
            num_workers (`int`, defaults to 0): Threads that decode pictures ahead.
            progress_bar (`bool`, defaults to `True`): Whether the main process shows one.

        Raises:
            `ValueError`: If the disk is too small, a picture would have to be cropped at random, or the autoencoder
                gives values that float16 does not hold.
        """
        processes = PartialState()
        missing = [file for file in self._files() if not self._has(*file)]
        self._check_space(missing)
        processes.wait_for_everyone()  # all have looked before one writes
        with claimed(self.folder) if missing and processes.is_main_process else nullcontext():
            self._encode(missing, processes, device, batch_size, num_workers, progress_bar)
        self._map()

    def _encode(
        self,
        missing: list[tuple[str, int, range]],
        processes: PartialState,
        device: torch.device | str,
        batch_size: int,
        num_workers: int,
        progress_bar: bool,
    ) -> None:
        if missing and processes.is_main_process:
            write_text(self.folder / FILE_NAME, json.dumps(self.made_of, indent=2) + "\n")
        processes.wait_for_everyone()
        if own := missing[processes.process_index :: processes.num_processes]:
            total = sum(len(rows) for _, _, rows in own)
            hidden = not (progress_bar and processes.is_main_process)
            with (
                self._encoders_on(device),
                ThreadPoolExecutor(max(1, num_workers), "pictures") as pool,
                tqdm(total=total, desc="encoding captions and pictures", disable=hidden) as bar,
            ):
                for kind, number, rows in own:
                    if kind == "moments":
                        tensors, notes = self._encode_pictures(rows, device, batch_size, pool, bar)
                    else:
                        tensors, notes = self._encode_captions(rows, device, batch_size, bar), {}
                    self._write(self._path(kind, number), tensors, notes)
        processes.wait_for_everyone()

    @contextmanager
    def _encoders_on(self, device: torch.device | str) -> Iterator[None]:
        homes = {encoder: encoder.device for encoder in self.family.encoders.values()}
        try:
            for encoder in homes:
                encoder.to(device)
            yield
        finally:
            for encoder, home in homes.items():
                encoder.to(home)

    def _files(self) -> Iterator[tuple[str, int, range]]:
        """Kind, number and rows of every file."""
        for kind, count in (("texts", len(self.captions)), ("moments", len(self.data))):
            for first in range(0, count, ROWS_A_FILE):
                yield kind, first // ROWS_A_FILE, range(first, min(first + ROWS_A_FILE, count))

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05}.safetensors"

    def _has(self, kind: str, number: int, rows: range) -> bool:
        path = self._path(kind, number)
        return path.is_file() and self._open(path) is not None

    def _open(self, path: Path) -> safe_open:
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"cache_latents {path}: cannot be read ({error}); delete it, and it is made again"
            ) from None
        if self._notes(file).get("key") != self.key:
            raise ValueError(f"cache_latents {path}: is of another cache; delete it, and it is made again")
        return file

    @staticmethod
    def _notes(file: safe_open) -> dict[str, Any]:
        return json.loads((file.metadata() or {}).get("notes", "{}"))

    def _check_space(self, missing: list[tuple[str, int, range]]) -> None:
        if not missing:
            return
        rows = {kind: sum(len(rows) for of, _, rows in missing if of == kind) for kind in ("texts", "moments")}
        channels, height, width = self.family.latent_shape
        moments = (2 if self.preprocessing.random_flip else 1) * 2 * channels * height * width
        texts = sum(value[0].numel() for value in self.family.encode([""]).values())
        needed = DTYPE.itemsize * (rows["moments"] * moments + rows["texts"] * texts)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"cache_latents {self.folder}: {needed / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free"
            )

    def _encode_pictures(
        self, rows: range, device: torch.device | str, batch_size: int, pool: Executor, bar: tqdm
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        loaded = _in_order(pool, self._load, rows, 2 * batch_size)
        moments, pictures, reasons = [], [], []
        while batch := list(islice(loaded, batch_size)):
            pixel_values = torch.stack([picture.pixel_values for picture, _ in batch])
            sides = [pixel_values, pixel_values.flip(-1)] if self.preprocessing.random_flip else [pixel_values]
            encoded = [self.family.encode_pictures(side, device).to("cpu", DTYPE) for side in sides]
            moments.append(torch.stack(encoded, dim=1))
            pictures += [(picture.original_size, picture.crop_top_left) for picture, _ in batch]
            reasons += [reason for _, reason in batch]
            bar.update(len(batch))
        unreadable = {self.data.name(row): reason for row, reason in zip(rows, reasons) if reason}
        original_sizes, crop_top_lefts = (torch.tensor(values) for values in zip(*pictures))
        tensors = {
            "moments": torch.cat(moments),
            "original_sizes": original_sizes,
            "crop_top_lefts": crop_top_lefts,
            "readable": torch.tensor([reason is None for reason in reasons]),
        }
        return tensors, {"unreadable": unreadable}

    def _load(self, place: int) -> tuple[Picture, str | None]:
        """A picture; a black one, and why, where it cannot be read."""
        size = self.preprocessing.resolution
        try:
            image = decode_image(self.data.image_of(self.data.row(place)))
        except UnreadableImage as error:
            return Picture(torch.full((3, size, size), -1.0), (0, 0), (0, 0)), str(error)
        if self.preprocessing.crops_at_random(image):
            raise ValueError(
                f"cache_latents: {self.data.name(place)} has {image.width} x {image.height} pixels, and a random crop "
                "cannot be cached; give --center_crop, too"
            )
        return self.preprocessing.crop(image, torch.Generator()), None

    def _encode_captions(
        self, rows: range, device: torch.device | str, batch_size: int, bar: tqdm
    ) -> dict[str, torch.Tensor]:
        captions = islice(self.captions, rows.start, rows.stop)
        parts = []
        while batch := list(islice(captions, batch_size)):
            parts.append(self.family.encode(batch, device, truncation=True))
            bar.update(len(batch))
        return {name: torch.cat([part[name].to("cpu", DTYPE) for part in parts]) for name in parts[0]}

    def _write(self, path: Path, tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> None:
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"cache_latents {path.name}: {name} has values that are not finite, or too big for {DTYPE}; are "
                    "the encoders in half precision?"
                )
        save_tensors(tensors, path, {"notes": json.dumps({"key": self.key, **notes})})

    # --- reading -----------------------------------------------------------------------------------------------------

    def _map(self) -> None:
        """Maps the files of the finished cache into memory."""
        files: dict[str, list[safe_open]] = {"texts": [], "moments": []}
        for kind, number, _ in self._files():
            files[kind].append(self._open(self._path(kind, number)))
        # Slices read only the rows that are asked for.
        self._slices = {
            kind: [{name: file.get_slice(name) for name in file.keys()} for file in own]  # noqa: SIM118
            for kind, own in files.items()
        }
        self.readable, self.original_sizes, self.crop_top_lefts = (
            torch.cat([file.get_tensor(name) for file in files["moments"]])
            for name in ("readable", "original_sizes", "crop_top_lefts")
        )
        notes = [self._notes(file)["unreadable"] for file in files["moments"]]
        self.unreadable = {name: reason for own in notes for name, reason in own.items()}

    def moments(self, places: list[int], flips: list[bool]) -> torch.Tensor:
        """Mean and log variance of pictures, or of their mirror images; `(B, 2 * C, H, W)`, float16."""
        return torch.stack(
            [
                self._slices["moments"][place // ROWS_A_FILE]["moments"][place % ROWS_A_FILE, int(flip)]
                for place, flip in zip(places, flips)
            ]
        )

    def conditioning(self, captions: list[str]) -> Conditioning:
        """What `encode` gave for captions of the dataset or `""`, float16.

        Raises:
            `ValueError`: If there is another among them.
        """
        if missing := [caption for caption in captions if caption not in self.captions]:
            raise ValueError(f"caption '{missing[0]}': is not in the cache")
        rows = [divmod(self.captions[caption], ROWS_A_FILE) for caption in captions]
        slices = self._slices["texts"]
        return {name: torch.stack([slices[file][name][row] for file, row in rows]) for name in slices[0]}


def _in_order(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """`pool.map`, but no more than `ahead` results wait to be taken."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _read_facts(path: Path) -> dict:
    """What a cache was made of.

    Raises:
        `ValueError`: If the file does not say so.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"cache_folder {path.parent}: {path.name} is not that of a latent cache; name another folder")
    return facts
