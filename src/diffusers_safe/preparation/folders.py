"""Folders of training data: what in them is pictures and captions, and that none of it lies outside of them."""

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an imagefolder
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MAX_DEPTH = 100  # of JSON; pyarrow's reader crashes on deeper nesting


class Boundary:
    """Folders that files must lie in, symbolic links followed.

    Args:
        folders (`str` or `Path`): One or more. Of a snapshot in the cache of the Hugging Face Hub, whose files are
            links to its blobs, the whole repository counts.
        remote (`tuple[str, ...]`, *optional*): How addresses begin that may be read from the network.
    """

    def __init__(self, *folders: str | Path, remote: tuple[str, ...] = ()):
        self.folder, self.remote = folders[0], remote
        self._roots = tuple(os.path.join(_root(folder), "") for folder in folders)
        self._parents: dict[str, str] = {}

    def holds(self, path: str | Path) -> bool:
        """Whether a file, there or not, lies inside; `"zip://a.png::FILE"` does where the file does."""
        path = str(path)
        if "://" in path:
            path = path.split("::")[-1]
            if "://" in path:
                return path.startswith(self.remote)
        parent, name = os.path.split(os.path.join(os.getcwd(), path))
        try:
            if parent not in self._parents:
                self._parents[parent] = os.path.realpath(parent)
            place = os.path.join(self._parents[parent], name)
            if name in ("", ".", "..") or os.path.islink(place):
                place = os.path.realpath(place)
        except ValueError:  # a name that no file can have
            return True
        return os.path.join(place, "").startswith(self._roots)

    def check(self, paths: Iterable[str | Path]) -> None:
        """
        Raises:
            `ValueError`: If one of the files lies outside.
        """
        for path in paths:
            if not self.holds(path):
                raise ValueError(
                    f"'{path}' lies outside of {self.folder}; only files inside are read, and symbolic links must not"
                    " lead out of it"
                )


def _root(folder: str | Path) -> str:
    path = Path(os.path.abspath(folder))
    caches = (p.parent for p in path.parents if p.name == "snapshots" and (p.parent / "blobs").is_dir())
    return os.path.realpath(next(caches, path))


def files_in(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, in order; folders that are symbolic links are not entered.

    Raises:
        `ValueError`: If one is a symbolic link that leads out of the folder.
    """
    entries = sorted(folder.rglob("*"))
    Boundary(folder).check(path for path in entries if path.is_symlink())
    return [path for path in entries if path.is_file()]


def check_depth(paths: Iterable[str | Path]) -> None:
    """Whether JSON files are nested no deeper than `MAX_DEPTH`; of other files nothing is asked.

    Raises:
        `ValueError`: If one is.
    """
    for path in (path for path in map(Path, paths) if path.suffix.lower() in (".json", ".jsonl")):
        depth = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                quoted = False
                for sign in (match[0] for match in re.finditer(rb'\\.|[][{}"]', line)):
                    if sign == b'"':
                        quoted = not quoted
                    elif not quoted:
                        depth += (sign in b"[{") - (sign in b"]}")
                    if depth > MAX_DEPTH:
                        raise ValueError(f"{path}, line {number}: JSON nested more than {MAX_DEPTH} levels deep")


def captioned_pictures(files: Iterable[Path]) -> tuple[list[Path], list[str]] | None:
    """The pictures among files, and the text of the `.txt` file next to each (`""` if there is none). `None` if no
    picture has one.

    Raises:
        `ValueError`: If one of them is not a text in UTF-8.
    """
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    captions = [_text(path.with_suffix(".txt")) for path in pictures]
    return (pictures, captions) if any(captions) else None


def _text(path: Path) -> str:
    return _decoded(path.read_bytes(), str(path)) if path.is_file() else ""


def _decoded(content: bytes, where: str) -> str:
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: a caption must be text in UTF-8 ({error.reason} at byte {error.start})") from None
    if "\0" in text:
        raise ValueError(f"{where}: a caption must be text, and it holds a null character")
    return text


def is_empty_tar(path: Path) -> bool:
    """Whether a tar file has no members, as that of a shard all of whose downloads failed; what is not a tar file is
    not empty."""
    try:
        with tarfile.open(path) as tar:
            return tar.next() is None
    except tarfile.TarError:
        return False


@dataclass
class TarSample:
    """A picture in a tar file.

    Attributes:
        member (`str`): Its name there.
        offset (`int`): Where its bytes begin.
        size (`int`): How many they are.
        facts (`dict`): The sample's JSON; `txt` is the text of its `.txt`.
    """

    member: str
    offset: int
    size: int
    facts: dict


def tar_samples(path: Path) -> Iterator[TarSample]:
    """The samples of a webdataset's tar file that have a picture: members whose names differ only in their ending.

    Raises:
        `ValueError`: If it is not a tar file, a member is a link, or a caption is not text in UTF-8.
    """
    samples: dict[str, dict] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.issym() or member.islnk():
                    raise ValueError(f"{path}: the member '{member.name}' is a link, which is not followed")
                parent, name = os.path.split(member.name)
                key, ending = name.split(".", 1) if "." in name else (name, "")
                if not member.isreg() or name.startswith((".", "__")):
                    continue
                sample, ending = samples.setdefault(os.path.join(parent, key), {"facts": {}}), ending.lower()
                if f".{ending}" in PICTURES:
                    sample.setdefault("picture", (member.name, member.offset_data, member.size))
                elif ending in ("txt", "json"):
                    content = tar.extractfile(member).read()
                    where = f"{path}: the member '{member.name}'"
                    sample["facts"] |= {"txt": _decoded(content, where)} if ending == "txt" else _object(content)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: cannot be read as a tar file ({error})") from None
    for sample in samples.values():
        if "picture" in sample:
            yield TarSample(*sample["picture"], sample["facts"])


def _object(content: bytes) -> dict:
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def described(files: Iterable[Path]) -> str:
    """What files there are, for a message: `"3 .jpg (a.jpg, ...) and 1 .json (b.json)"`."""
    by_ending: dict[str, list[str]] = {}
    for path in files:
        by_ending.setdefault(path.suffix.lower() or "without an ending", []).append(path.name)
    told = [
        f"{len(names)} {ending} ({names[0]}{', ...' if len(names) > 1 else ''})" for ending, names in by_ending.items()
    ]
    return " and ".join(filter(None, [", ".join(told[:-1]), *told[-1:]])) or "no files"
