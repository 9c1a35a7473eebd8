"""The manifest of generated images: one file, a line for each image, and the images that it lists.

A line is written just before its image, which is written whole. Whatever a stopped run leaves, [`Manifest.tidy`] makes
one file of it.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

from ..files import json_lines, write_text
from ..images import open_rgb, to_rgb
from ..output_folders import OutputFolderError, make_way
from .rows import OWN_SETTINGS, GenerationSettings, PromptRow


MANIFEST = "manifest.jsonl"
_ADVICE = "give another folder, or --overwrite to replace them"
_REQUIRED = ("id", "prompt", "seed", "labels", "file", "black", "sha256")  # what every reader of a manifest needs


def read_manifest(folder: str | Path) -> list[dict]:
    """Reads the manifest of a folder, as [`generate`] returns it, without an incomplete last line.

    Raises:
        `ValueError`: If there is no manifest, or a line is broken.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the folder holds no generated images")
    return _json_rows(path)


_KINDS = {
    "id": str,
    "file": str,
    "prompt": str,
    "seed": int,
    "model": (str, type(None)),
    "settings": (dict, type(None)),
    "labels": dict,
    "black": bool,
}


def _json_rows(path: Path, skip_broken: bool = False) -> list[dict]:
    """The rows of a manifest. `skip_broken` leaves out lines that are not JSON, unless all are."""
    lines = json_lines(path)
    if not lines and path.stat().st_size:
        raise OutputFolderError(f"{path}: no manifest of generated images; it has no complete line")
    rows = [(number, row) for number, (_, row) in enumerate(lines, 1) if row is not None]
    if len(rows) < len(lines) and not (skip_broken and rows):
        number = next(number for number, (_, row) in enumerate(lines, 1) if row is None)
        raise OutputFolderError(
            f"{path}: line {number} is broken; run the generation again, it generates only missing images"
        )
    for number, row in rows:
        lacking = [name for name in _REQUIRED if name not in row] if isinstance(row, dict) else ["fields"]
        if lacking:
            raise OutputFolderError(f"{path}: no manifest of generated images; line {number} has no {lacking[0]}")
        for name, kinds in _KINDS.items():
            if name in row and not isinstance(row[name], kinds):
                raise OutputFolderError(f"{path}: line {number}: {name} {row[name]!r:.80} has a wrong type")
        if Path(row["file"]).name != row["file"]:
            raise OutputFolderError(f"{path}: line {number} names a file outside of the folder: {row['file']}")
    return [row for _, row in rows]


def load_image(folder: str | Path, row: dict) -> Image.Image:
    """Loads a generated image, RGB, by its row of the manifest.

    Raises:
        `ValueError`: If the file is missing, or differs from the one that was generated.
    """
    path = Path(folder) / row["file"]
    if not _is_intact(path, row):
        state = "damaged or changed since it was generated" if path.is_file() else "no such file"
        raise ValueError(f"{path}: {state}; run the generation again, it generates only missing images")
    return open_rgb(path)


def load_images(folder: str | Path, rows: list[dict]) -> np.ndarray:
    """Loads generated images of one size.

    Args:
        folder (`str` or `Path`): Where [`generate`] wrote them.
        rows (`list[dict]`): Rows of the manifest, at least one.

    Returns:
        `np.ndarray`: `(N, H, W, 3)`, `uint8`, in the order of `rows`.

    Raises:
        `ValueError`: If a file is missing or differs from the one that was generated, or sizes differ.
    """
    if not rows:
        raise ValueError("no rows: there must be at least one image to load")
    images = [np.asarray(load_image(folder, row)) for row in rows]
    shapes = {image.shape[:2]: row["file"] for image, row in zip(images, rows)}
    if len(shapes) > 1:
        sizes = ", ".join(f"{file} {height} x {width}" for (height, width), file in shapes.items())
        raise ValueError(f"{folder}: images of different sizes cannot be loaded together: {sizes}")
    return np.stack(images)


def identity_of(row: PromptRow) -> dict:
    """The fields of a row in the manifest, as JSON gives them back."""
    return json.loads(json.dumps({name: value for name, value in asdict(row).items() if name not in OWN_SETTINGS}))


class Manifest:
    """The manifest of a folder while images are generated: one file, and a part for each of several processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / MANIFEST

    def open(self, part: int | None) -> TextIO:
        path = self.path if part is None else self.folder / f".{MANIFEST}.{part}"
        return path.open("a", encoding="utf-8")

    def announce(self, file: TextIO, entry: dict) -> None:
        """Writes a line, just before its image is written."""
        file.write(_line(entry))
        file.flush()

    def read(self) -> dict[str, dict]:
        """id -> row of the manifest, without the parts."""
        return {row["id"]: row for row in _json_rows(self.path, skip_broken=True)} if self.path.exists() else {}

    def check(self, rows: list[PromptRow], model: str, settings: GenerationSettings, checked: bool) -> None:
        """Checks that the contents of the folder belong to this run.

        Raises:
            `ValueError`: If they are of another model or other settings, or of another prompt under the same id.
        """
        own = {row.id: row for row in rows}
        if not self.path.exists() and (others := [name for name in own if (self.folder / f"{name}.png").exists()]):
            raise OutputFolderError(f"{self.folder}: holds {others[0]}.png, which no {MANIFEST} lists; {_ADVICE}")
        try:
            listed = self._all_rows()
        except OutputFolderError as error:
            raise OutputFolderError(f"{error}; {_ADVICE}") from None
        for known in listed.values():
            row = own.get(known["id"])
            expected = json.loads(json.dumps(asdict(settings if row is None else settings.of_row(row))))
            if row is None:  # not part of this run: it may have overridden guidance and size
                expected |= {name: (known.get("settings") or {}).get(name) for name in OWN_SETTINGS}
            of_all = {"model": model, "settings": expected, "safety_checker": checked or None}
            identity = {} if row is None else identity_of(row)
            for name, value in {**of_all, **identity}.items():
                if (found := known.get(name)) != value:
                    what = "its images have" if name in of_all else f"{row.id} has"
                    raise OutputFolderError(f"{self.path}: {what} {name} {found}, not {value}; {_ADVICE}")

    def discard(self, rows: list[PromptRow]) -> None:
        """Deletes the images that the manifest lists, and the manifest; other files in the way are moved."""
        in_the_way = [f"{row.id}.png" for row in rows]
        try:
            for row in self._all_rows().values():
                if _is_intact(self.folder / row["file"], row):
                    (self.folder / row["file"]).unlink()
            self._write([])
        except OutputFolderError:  # not a manifest of ours
            in_the_way += [MANIFEST, *(path.name for path in self._parts())]
        make_way(self.folder, in_the_way)

    def tidy(self) -> None:
        """Merges the manifest and its parts into one file, without rows whose image is missing or broken."""
        for path in self.folder.glob(".*.png.partial"):
            path.unlink()
        rows = self._all_rows()
        self._write([row for row in rows.values() if _is_intact(self.folder / row["file"], row)])

    def close(self, order: list[str]) -> None:
        """Merges everything into one file, first the ids of `order`, then other rows."""
        rows = self._all_rows()
        self._write([rows.pop(name) for name in order] + list(rows.values()))

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f".{MANIFEST}.[0-9]*"))

    def _all_rows(self) -> dict[str, dict]:
        rows = self.read()
        for path in self._parts():
            rows |= {row["id"]: row for row in _json_rows(path, skip_broken=True)}
        return rows

    def _write(self, rows: list[dict]) -> None:
        write_text(self.path, "".join(map(_line, rows)))
        for path in self._parts():  # now in the file
            path.unlink()


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _is_intact(path: Path, row: dict) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]


def save_png(folder: Path, name: str, image: Image.Image, announce: Callable[[dict], None] | None = None) -> dict:
    """Writes a PNG completely or not at all, and returns its facts for the manifest.

    The facts are announced before the file is written. A different file of the same name is not of this run and is
    moved away.
    """
    image = to_rgb(image)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    png, path = buffer.getvalue(), folder / name
    facts = {"file": name, "black": image.getbbox() is None, "sha256": hashlib.sha256(png).hexdigest()}
    if os.path.lexists(path) and (path.is_symlink() or not _is_intact(path, facts)):
        make_way(folder, [name])
    aside = folder / f".{name}.partial"
    aside.write_bytes(png)
    if announce is not None:
        announce(facts)
    os.replace(aside, path)
    return facts
