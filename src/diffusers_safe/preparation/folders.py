"""Finds images and captions in folders of training data, and refuses files outside of these folders."""

import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of the format `imagefolder` of `datasets`
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MAX_DEPTH = 100  # of JSON files: pyarrow crashes on deeply nested ones
_TAR_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)


class Boundary:
    """The folders from which files may be read. Symbolic links are resolved before the check.

    Args:
        folders (`str` or `Path`): One or more folders. For a snapshot in the cache of the Hugging Face Hub, whose
            files are links to blobs, files of the whole cached repository are allowed.
        remote (`tuple[str, ...]`, *optional*): Prefixes of URLs that may be read.
    """

    def __init__(self, *folders: str | Path, remote: tuple[str, ...] = ()):
        self.folder, self.remote = folders[0], remote
        self._roots = tuple(os.path.join(_root(folder), "") for folder in folders)
        self._parents: dict[str, str] = {}

    def holds(self, path: str | Path) -> bool:
        """Whether a path lies inside. The file may be missing. For `"zip://a.png::FILE"`, `FILE` is checked."""
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
        except ValueError:  # not a valid file name
            return True
        return os.path.join(place, "").startswith(self._roots)

    def check(self, paths: Iterable[str | Path]) -> None:
        """Checks that paths lie inside.

        Raises:
            `ValueError`: If a path lies outside.
        """
        for path in paths:
            if not self.holds(path):
                raise ValueError(
                    f"'{path}' lies outside of {self.folder}; only files inside are read, and symbolic links must not"
                    " lead outside"
                )


def _root(folder: str | Path) -> str:
    path = Path(os.path.abspath(folder))
    caches = (p.parent for p in path.parents if p.name == "snapshots" and (p.parent / "blobs").is_dir())
    return os.path.realpath(next(caches, path))


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted; as in `datasets`, without those whose name, or that of a
    subfolder, begins with `.` or `__`. Subfolders that are symbolic links are not entered.

    Raises:
        `ValueError`: If a symbolic link leads outside of the folder, or a name is not UTF-8.
    """
    entries = sorted(path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder)))
    Boundary(folder).check(path for path in entries if path.is_symlink())
    for path in entries:
        _check_text(path.name, f"{folder}: the file name {ascii(path.name)}")
    return [path for path in entries if path.is_file()]


def _is_hidden(path: Path) -> bool:
    """Such as `._a.png` and `__MACOSX/a.png` of macOS, or `.ipynb_checkpoints/a.png`."""
    return any(part.startswith((".", "__")) for part in path.parts)


def check_files(paths: Iterable[str | Path]) -> None:
    """Checks the files among the paths that are tables or tar files for what crashes their readers, what these report
    without the file's name, and what they take for the end.

    Raises:
        `ValueError`: If a JSON file does not begin with an object or a list, or is nested more than `MAX_DEPTH` levels
            deep; a parquet or tar file is not whole; or a metadata file has no rows.
    """
    checks = {".json": _check_json, ".jsonl": _check_json, ".parquet": _check_parquet, ".tar": is_empty_tar}
    for path in map(Path, paths):
        if path.name == "metadata.csv":
            _check_csv(path)
        elif (check := checks.get(path.suffix.lower())) is not None:
            check(path)


def _check_json(path: Path) -> None:
    depth, begun = 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not begun and (start := line.removeprefix(b"\xef\xbb\xbf").strip()):
                if not start.startswith((b"{", b"[")):
                    raise ValueError(f"{path}, line {number}: JSON objects are needed, one a line or in a list")
                begun = True
            quoted = False
            for sign in (match[0] for match in re.finditer(rb'\\.|[][{}"]', line)):
                if sign == b'"':
                    quoted = not quoted
                elif not quoted:
                    depth += (sign in b"[{") - (sign in b"]}")
                if depth > MAX_DEPTH:
                    raise ValueError(f"{path}, line {number}: JSON nested more than {MAX_DEPTH} levels deep")
    if not begun:
        raise ValueError(f"{path}: is empty")


def _check_csv(path: Path) -> None:
    with open(path, encoding="utf-8", errors="replace") as file:
        if len(list(islice(filter(str.strip, file), 2))) < 2:
            raise ValueError(f"{path}: has no rows below its header")


def _check_parquet(path: Path) -> None:
    """A shard without even a group of rows is passed over, as it should be."""
    try:
        facts = pq.read_metadata(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a parquet file ({error})") from None
    if not facts.num_rows and (facts.num_row_groups or path.name in METADATA):
        raise ValueError(f"{path}: has no rows")


def captioned_pictures(files: Iterable[Path]) -> tuple[list[Path], list[str]] | None:
    """Finds images with a `.txt` file next to them.

    Returns:
        `tuple[list[Path], list[str]]`: All images, and the caption of each (`""` if it has none); `None` if no
        image has a caption.

    Raises:
        `ValueError`: If a caption is not UTF-8 text.
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
        raise ValueError(f"{where}: a caption must be text, and this one contains a null character")
    return text


def _check_text(text: str, where: str) -> None:
    """What is not UTF-8 cannot be stored in a table."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not UTF-8 text") from None


def is_empty_tar(path: Path) -> bool:
    """Whether a tar file has no members, like a shard of img2dataset in which all downloads failed.

    Raises:
        `ValueError`: If the file is not a whole tar file.
    """
    try:
        with tarfile.open(path) as tar:
            return not sum(1 for _ in _members(tar))
    except _TAR_ERRORS as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(":")
        raise ValueError(f"{path}: cannot be read as a tar file ({reason})") from None


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file. `tarfile` takes a damaged header for the end, after which there are only zeros.

    Raises:
        `tarfile.ReadError`: If the file is damaged or was cut short.
    """
    yield from tar
    tar.fileobj.seek(tar.offset)
    end, rest = tar.fileobj.read(tarfile.BLOCKSIZE), iter(lambda: tar.fileobj.read(2**20), b"")
    if end != bytes(tarfile.BLOCKSIZE) or any(part.strip(b"\0") for part in rest):
        raise tarfile.ReadError(f"damaged or cut short at byte {tar.offset:,}")


@dataclass
class TarSample:
    """An image in a tar file.

    Attributes:
        member (`str`): Name in the tar file.
        offset (`int`): Position of the first byte in the tar file.
        size (`int`): Number of bytes.
        fields (`dict`): Fields of the sample's `.json`, and the text of its `.txt` as `txt`.
    """

    member: str
    offset: int
    size: int
    fields: dict


def tar_samples(path: Path) -> Iterator[TarSample]:
    """The samples with an image in a WebDataset tar file. Members whose names differ only in their extension belong
    to the same sample.

    Raises:
        `ValueError`: If the file is not a whole tar file, a member is a link, or a name or caption is not UTF-8 text.
    """
    samples: dict[str, dict] = {}
    try:
        with tarfile.open(path, "r:") as tar:  # a compressed one has no positions at which images can be read
            for member in _members(tar):
                if member.issym() or member.islnk():
                    raise ValueError(f"{path}: the member '{member.name}' is a link, which is not followed")
                parent, name = os.path.split(member.name)
                key, ending = name.split(".", 1) if "." in name else (name, "")
                if not member.isreg() or name.startswith((".", "__")):
                    continue
                sample, ending = samples.setdefault(os.path.join(parent, key), {"fields": {}}), ending.lower()
                if f".{ending}" in PICTURES:
                    sample.setdefault("picture", (member.name, member.offset_data, member.size))
                elif ending in ("txt", "json"):
                    content = tar.extractfile(member).read()
                    where = f"{path}: the member '{member.name}'"
                    sample["fields"] |= {"txt": _decoded(content, where)} if ending == "txt" else _json_fields(content)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: cannot be read as an uncompressed tar file ({error})") from None
    for sample in samples.values():
        if "picture" in sample:
            name, fields = sample["picture"][0], sample["fields"]
            for text in (name, *(value for value in fields.values() if isinstance(value, str))):
                _check_text(text, f"{path}: text of the member {ascii(name)}")
            yield TarSample(*sample["picture"], sample["fields"])


def _json_fields(content: bytes) -> dict:
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def described(files: Iterable[Path]) -> str:
    """A summary of files for a message: `"3 .jpg (a.jpg, ...) and 1 .json (b.json)"`."""
    by_ending: dict[str, list[str]] = {}
    for path in files:
        by_ending.setdefault(path.suffix.lower() or "without an ending", []).append(path.name)
    parts = [
        f"{len(names)} {ending} ({names[0]}{', ...' if len(names) > 1 else ''})" for ending, names in by_ending.items()
    ]
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "no files"
