"""Existing images: of an earlier run or from another tool."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..images import UnreadableImage, open_rgb
from .manifest import MANIFEST, read_manifest
from .rows import PromptRow


class ImagesError(ValueError):
    """Images that cannot be measured. They are checked before anything is generated."""

    exit_code = 2


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images in place of a model.

    With a manifest of [`generate`], images are found by their ids, or by prompt and seed. Without one, they are PNGs
    named `{id}.png`. For prompt lists with case numbers this is `{case_number}_{n}.png`, as in ESD and its followers.
    They are read as [`to_rgb`] describes.

    Attributes:
        name (`str`): Name in tables.
        folder (`Path`): Folder with the images.
    """

    name: str
    folder: Path

    @property
    def has_manifest(self) -> bool:
        return (Path(self.folder) / MANIFEST).is_file()

    def check(self) -> None:
        """
        Raises:
            [`ImagesError`]: If there is no folder, it holds no manifest and no PNG, or scores cannot be written to it.
        """
        if not Path(self.folder).is_dir():
            raise ImagesError(f"{self.name}: {self.folder} is not a folder of images")
        if not self.has_manifest and not any(Path(self.folder).glob("*.png")):
            raise ImagesError(f"{self.name}: {self.folder} holds no model, no {MANIFEST} and no PNG")
        if not os.access(self.folder, os.W_OK):
            raise ImagesError(
                f"{self.name}: {self.folder} is read-only, and scores are written there; copy the images"
            )

    def find(self, rows: Sequence[PromptRow]) -> list[dict]:
        """Rows of a manifest, one for each of `rows`, after a check of every file; with `size`, (width, height) in
        pixels.

        Raises:
            [`ImagesError`]: If an image is missing or broken or of another prompt or seed, or images are of several
                models.
        """
        self.check()
        return self._of_manifest(rows) if self.has_manifest else self._of_files(rows)

    def _of_manifest(self, rows: Sequence[PromptRow]) -> list[dict]:
        known = read_manifest(self.folder)
        by_id = {row["id"]: row for row in known}
        by_prompt = {(row["prompt"], row["seed"]): row for row in known}
        found, missing = [], []
        for row in rows:
            match = by_id.get(row.id) or by_prompt.get((row.prompt, row.seed))
            if match is None:
                missing.append(row.id)
                continue
            for name in ("prompt", "seed"):
                if match[name] != getattr(row, name):
                    raise ImagesError(
                        f"{self.name}: image {row.id} in {self.folder} has {name} {match[name]},"
                        f" not {getattr(row, name)}"
                    )
            found.append({**match, "id": row.id, "labels": row.labels})
        self._check_missing(missing, len(rows))
        if len({row.get("model") for row in found}) > 1:
            raise ImagesError(f"{self.name}: the images in {self.folder} are of more than one model")
        for row in found:
            read = self._read(row["file"])
            if read["sha256"] != row["sha256"]:
                raise ImagesError(f"{self.name}: {Path(self.folder) / row['file']} was changed since it was generated")
            row["size"] = read["size"]
        return found

    def _of_files(self, rows: Sequence[PromptRow]) -> list[dict]:
        files = [f"{row.id}.png" for row in rows]
        self._check_missing([file for file in files if not (Path(self.folder) / file).is_file()], len(rows))
        return [{**asdict(row), "file": file, **self._read(file)} for row, file in zip(rows, files)]

    def _check_missing(self, missing: list[str], asked: int) -> None:
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ImagesError(f"{self.name}: {self.folder} lacks {missing[0]}{more} of {asked} images")

    def _read(self, file: str) -> dict:
        path = Path(self.folder) / file
        try:
            data = path.read_bytes()
            image = open_rgb(path)
        except UnreadableImage as error:
            raise ImagesError(f"{self.name}: {error}") from None
        except OSError as error:
            raise ImagesError(f"{self.name}: {path} cannot be read ({error.strerror})") from None
        black = image.getbbox() is None
        return {"black": black, "size": image.size, "sha256": hashlib.sha256(data).hexdigest()}


def common_settings(rows: Sequence[dict]) -> dict | None:
    """The settings of a manifest's rows with `safety_checker`, `"on"` or `"off"`. `"of each row"` if a guidance scale
    or size differs between rows; `None` if unknown."""
    known = [row.get("settings") for row in rows]
    if None in known:
        return None
    common = {
        name: value if all(settings.get(name) == value for settings in known) else "of each row"
        for name, value in known[0].items()
    }
    return {**common, "safety_checker": "on" if any(row.get("safety_checker") for row in rows) else "off"}
