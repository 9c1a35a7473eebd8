"""`--cache_latents`: the outputs of autoencoder and text encoders for a dataset, computed once and stored on disk.

The folder contains

* `cache.json`: the data, preprocessing and model that the cache belongs to;
* `moments-*.safetensors`: mean and log variance of the latents of each image (and of the flipped image, if
  images are flipped);
* `texts-*.safetensors`: the text embeddings of each distinct caption and of `""`.

A file is either complete or missing, so an interrupted build continues.
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
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ...families import Conditioning, ModelFamily
from ...files import save_tensors, write_text
from ...output_folders import claimed
from .dataset import CaptionedImages
from .images import Picture, Preprocessing, UnreadableImage, decode_image


FILE_NAME = "cache.json"
ROWS_PER_FILE = 512
# The relative rounding error is below 1/2000; the lowest noise level of Stable Diffusion is 60 times as large.
DTYPE = torch.float16


class CacheFile(NamedTuple):
    """A file of a cache: `"texts"` or `"moments"` of some rows."""

    kind: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:05}.safetensors"


class LatentCache:
    """The cache of one dataset, one preprocessing and one model.

    Args:
        folder (`str` or `Path`): Folder of the cache.
        data (`CaptionedImages`): The dataset; not a stream.
        preprocessing (`Preprocessing`): The preprocessing; with a center crop, unless all images are square.
        family (`ModelFamily`): The model whose encoders are used.

    Attributes:
        captions (`dict[str, int]`): Row of each distinct caption; `""` is the first.
        identity (`dict`): Content of `cache.json`.
        readable (`torch.Tensor`): `(N,)`, whether each image could be read. This and the following attributes exist
            after `build`.
        original_sizes (`torch.Tensor`): `(N, 2)`, height and width before resizing.
        crop_top_lefts (`torch.Tensor`): `(N, 2)`, offsets of the crops in the resized images.
        unreadable (`dict[str, str]`): Names of unreadable images, with the reason.

    Raises:
        `ValueError`: If the folder contains another cache, or the data is a stream.
    """

    def __init__(self, folder: str | Path, data: CaptionedImages, preprocessing: Preprocessing, family: ModelFamily):
        if data.streaming:
            raise ValueError("cache_latents: a stream cannot be cached; leave out --streaming")
        self.folder, self.data, self.preprocessing, self.family = Path(folder), data, preprocessing, family
        distinct = dict.fromkeys(caption for captions in data.all_captions() for caption in captions)
        self.captions = {caption: row for row, caption in enumerate(dict.fromkeys(["", *distinct]))}
        self.identity = {
            **family.encoding_identity,
            "data": data.fingerprint(),
            "samples": len(data),
            **asdict(preprocessing),
        }
        self.key = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:16]
        self._check()

    def _check(self) -> None:
        path = self.folder / FILE_NAME
        if not path.is_file():
            return
        found, wanted = _read_identity(path), self.identity
        if different := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
            differences = ", ".join(f"{name} {found.get(name)}, not {wanted.get(name)}" for name in different)
            raise ValueError(
                f"cache_latents {self.folder}: belongs to other settings ({differences}); choose another folder with "
                "--cache_folder"
            )

    # --- building ----------------------------------------------------------------------------------------------------

    def build(
        self,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        num_workers: int = 0,
        progress_bar: bool = True,
    ) -> None:
        """Encodes the missing part and opens the cache. Must be called on every process; each encodes a part.

        Args:
            device (`torch.device`, defaults to `"cpu"`): Device of the encoders.
            batch_size (`int`, defaults to 8): Number of images per batch.
            num_workers (`int`, defaults to 0): Number of threads that prefetch images.
            progress_bar (`bool`, defaults to `True`): Whether the main process shows a progress bar.

        Raises:
            `ValueError`: If the disk is too small, an image would be cropped at random, or the encoders return
                values that float16 cannot represent.
        """
        processes = PartialState()
        missing = [file for file in self._files() if not self._exists(file)]
        self._check_space(missing)
        processes.wait_for_everyone()  # all processes look for files before one writes
        with claimed(self.folder) if missing and processes.is_main_process else nullcontext():
            self._encode(missing, processes, device, batch_size, num_workers, progress_bar)
        self._map()

    def _encode(
        self,
        missing: list[CacheFile],
        processes: PartialState,
        device: torch.device | str,
        batch_size: int,
        num_workers: int,
        progress_bar: bool,
    ) -> None:
        if missing and processes.is_main_process:
            write_text(self.folder / FILE_NAME, json.dumps(self.identity, indent=2) + "\n")
        processes.wait_for_everyone()
        if own := missing[processes.process_index :: processes.num_processes]:
            total = sum(len(file.rows) for file in own)
            hidden = not (progress_bar and processes.is_main_process)
            with (
                self._encoders_on(device),
                ThreadPoolExecutor(max(1, num_workers), "pictures") as pool,
                tqdm(total=total, desc="encoding captions and images", disable=hidden) as bar,
            ):
                for file in own:
                    if file.kind == "moments":
                        tensors, notes = self._encode_pictures(file.rows, device, batch_size, pool, bar)
                    else:
                        tensors, notes = self._encode_captions(file.rows, device, batch_size, bar), {}
                    self._write(self.folder / file.name, tensors, notes)
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

    def _files(self) -> Iterator[CacheFile]:
        """The files of the complete cache."""
        for kind, count in (("texts", len(self.captions)), ("moments", len(self.data))):
            for first in range(0, count, ROWS_PER_FILE):
                yield CacheFile(kind, first // ROWS_PER_FILE, range(first, min(first + ROWS_PER_FILE, count)))

    def _exists(self, file: CacheFile) -> bool:
        path = self.folder / file.name
        if not path.is_file():
            return False
        self._open(path)  # checks the file
        return True

    def _open(self, path: Path) -> safe_open:
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cache_latents {path}: cannot be read ({error}); delete it to create it again") from None
        if self._notes(file).get("key") != self.key:
            raise ValueError(f"cache_latents {path}: belongs to another cache; delete it to create it again")
        return file

    @staticmethod
    def _notes(file: safe_open) -> dict[str, Any]:
        return json.loads((file.metadata() or {}).get("notes", "{}"))

    def _check_space(self, missing: list[CacheFile]) -> None:
        if not missing:
            return
        rows = {kind: sum(len(file.rows) for file in missing if file.kind == kind) for kind in ("texts", "moments")}
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
        """An image, or a black one and the reason if it cannot be read."""
        size = self.preprocessing.resolution
        try:
            image = decode_image(self.data.image_of(self.data.row(place)))
        except UnreadableImage as error:
            return Picture(torch.full((3, size, size), -1.0), (0, 0), (0, 0)), str(error)
        if self.preprocessing.crops_at_random(image):
            raise ValueError(
                f"cache_latents: {self.data.name(place)} has {image.width} x {image.height} pixels, and a random crop "
                "cannot be cached; also give --center_crop"
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
                    f"cache_latents {path.name}: {name} has values that are not finite, or too large for {DTYPE}; are "
                    "the encoders in half precision?"
                )
        save_tensors(tensors, path, {"notes": json.dumps({"key": self.key, **notes})})

    # --- reading -----------------------------------------------------------------------------------------------------

    def _map(self) -> None:
        """Memory-maps the files of the finished cache."""
        files: dict[str, list[safe_open]] = {"texts": [], "moments": []}
        for file in self._files():
            files[file.kind].append(self._open(self.folder / file.name))
        # Slices only read the requested rows.
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
        """Mean and log variance of the latents of images, or of flipped images: `(B, 2 * C, H, W)`, float16."""
        return torch.stack(
            [
                self._slices["moments"][place // ROWS_PER_FILE]["moments"][place % ROWS_PER_FILE, int(flip)]
                for place, flip in zip(places, flips)
            ]
        )

    def conditioning(self, captions: list[str]) -> Conditioning:
        """The conditioning for captions of the dataset or `""`, float16.

        Raises:
            `ValueError`: If a caption is not in the cache.
        """
        if missing := [caption for caption in captions if caption not in self.captions]:
            raise ValueError(f"caption '{missing[0]}': is not in the cache")
        rows = [divmod(self.captions[caption], ROWS_PER_FILE) for caption in captions]
        slices = self._slices["texts"]
        return {name: torch.stack([slices[file][name][row] for file, row in rows]) for name in slices[0]}


def _in_order(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """`pool.map` with at most `ahead` results that wait to be used."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _read_identity(path: Path) -> dict:
    """Reads the `cache.json` of a cache.

    Raises:
        `ValueError`: If the file was not written by a cache.
    """
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        identity = None
    if not isinstance(identity, dict):
        raise ValueError(
            f"cache_folder {path.parent}: {path.name} does not belong to a latent cache; choose another folder"
        )
    return identity
