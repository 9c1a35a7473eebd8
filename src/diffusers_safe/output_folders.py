"""Output folders: one run at a time, and nothing is lost that this program did not write.

    with claimed("runs/knife", replaces=["model_index.json", "vae"], overwrite=False) as folder:
        ...  # the only run that writes here
        put_in_place(aside, folder, ["model_index.json", "vae"])

`.written.json` in a folder says which files this program wrote there. Only these are ever deleted; what else stands in
the way of a new result, which `--overwrite` allows, is moved into `.replaced-1` of the same folder.
"""

import errno
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import follow_umask, write_text
from .messages import is_first_process


logger = logging.getLogger(__name__)

RECORD = ".written.json"
LOCK = ".lock"
RESULT = "result"  # kind of all runs that write a model
OVERWRITE_HELP = (
    "Replace the results of another run in the output folder. Files that this package did not write are kept; if they "
    "are in the way, they are moved to .replaced-1."
)
_ROOM = 400  # bytes of a path, for the names of files in the folder
# Files that loaders look for: another's must not stay among those of a new result. All others stay where they are.
_LOADED = (".safetensors", ".bin", ".json", ".jsonl", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5", ".onnx")
_FILES = (".json", ".jsonl", ".html", ".md", ".png", ".csv")
# Names of what we write aside before it is moved into its place.
_WRITTEN_ASIDE = (*_LOADED, ".txt", ".model", ".md", ".png", ".py")
_runs: dict[str, tuple[str, Any]] = {}  # folder -> kind and identity of the run of this process that has claimed it


class OutputFolderError(ValueError):
    """An output folder that cannot be used as it is asked for."""

    exit_code = 2


# --- claiming --------------------------------------------------------------------------------------------------------


@contextmanager
def claimed(
    folder: str | Path,
    kind: str = "",
    run: Any = None,
    *,
    replaces: Sequence[str] = (),
    continues: Sequence[str] = (),
    overwrite: bool = False,
    at_once: bool = False,
    is_own: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Makes a folder this run's own for the length of the block: any other run is refused.

    Of the processes of one launch the first claims; to the others it does nothing.

    Args:
        folder (`str` or `Path`): Made if need be.
        kind (`str`): What the run makes, such as `RESULT`.
        run (*optional*): What tells this run from others of its kind, as JSON gives it back.
        replaces (`Sequence[str]`): Patterns of names in the folder that a result must not replace unasked.
        continues (`Sequence[str]`): The same, but what an earlier start of the same `run` left is its own.
        overwrite (`bool`, defaults to `False`): Allow to replace them, which [`put_in_place`] does.
        at_once (`bool`, defaults to `False`): Let them make way before the block: the log of this run must not lie
            next to another's result.
        is_own (`Callable`, *optional*): Says of a folder without a record, of an earlier version, whether `continues`
            is this run's own.

    Raises:
        [`OutputFolderError`]: If the folder cannot be written, another run is at work there, or it holds results that
            are not this run's own.
    """
    path = check_output_dir(folder)
    if not is_first_process():
        yield path
        return
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFolderError(f"output_dir {folder}: cannot be made ({error.strerror})") from None
    key = os.path.realpath(path)
    try:
        with _locked(path):
            in_the_way = _in_the_way(path, kind, run, replaces, continues, overwrite, is_own)
            make_way(path, in_the_way if at_once else [])
            _runs[key] = (kind, run)
            try:
                if not in_the_way and is_own is not None and kind not in _Written(path).runs:
                    # What an earlier version wrote, without a record.
                    if files := [name for name in _found(path, continues) if (path / name).is_file()]:
                        record_written(path, *files)
                yield path
            finally:
                _Written(path).settle()
                del _runs[key]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"output_dir {folder}: cannot be written (no space left on the disk)") from error
    finally:
        for parent in made:
            with suppress(OSError):  # it holds something
                parent.rmdir()


def check_claim(folder: str | Path, at_once: bool = False, **claim: Any) -> None:
    """Raises what [`claimed`] would, with the same arguments, and changes nothing: to know it before any work."""
    path = check_output_dir(folder)
    if not is_first_process() or not path.is_dir():
        return
    if (path / LOCK).exists():
        with _locked(path):
            pass
    _in_the_way(path, **claim)


def _in_the_way(
    path: Path,
    kind: str = "",
    run: Any = None,
    replaces: Sequence[str] = (),
    continues: Sequence[str] = (),
    overwrite: bool = False,
    is_own: Callable[[Path], bool] | None = None,
) -> list[str]:
    """Names of what must make way for a run, if it may."""
    found = [*_found(path, replaces), *_not_own(path, kind, run, continues, is_own)]
    if found and not overwrite:
        raise OutputFolderError(
            f"output_dir {path}: holds results of another run ({found[0]}); give another folder, or --overwrite to "
            "replace them"
        )
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The kernel frees the lock of a process that is killed. The file is unlinked while it is held: filelock does not
    take an unlinked one for the lock."""
    with suppress(FileNotFoundError):  # the lock of a run that ends just now
        there = (path / LOCK).lstat()
        if stat.S_ISREG(there.st_mode) and there.st_size:
            raise OutputFolderError(f"output_dir {path}: holds a file {LOCK} of another program; give another folder")
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputFolderError(
            f"output_dir {path}: another run is at work there; wait for its end, or give another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise OutputFolderError(f"output_dir {path}: cannot be locked ({error})") from None
    try:
        yield
    finally:
        with suppress(OSError):
            (path / LOCK).unlink()
        lock.release()


def _not_own(
    path: Path, kind: str, run: Any, patterns: Sequence[str], is_own: Callable[[Path], bool] | None
) -> list[str]:
    found = _found(path, patterns)
    if not found:
        return []
    runs = _Written(path).runs
    if kind in runs:
        return [] if runs[kind] == json.loads(json.dumps(run)) else found
    return [] if is_own is not None and is_own(path) else found


def _found(path: Path, patterns: Sequence[str]) -> list[str]:
    """Names in a folder that fit a pattern and hold something, in the patterns' order."""
    names, written = sorted(os.listdir(path)) if patterns else [], _Written(path)
    found = [name for pattern in patterns for name in names if fnmatch(name, pattern)]
    for name in [RECORD, *found]:
        if Path(name).suffix in _FILES and (path / name).is_dir():
            raise OutputFolderError(f"output_dir {path}: {name} is a folder, where a file is to be written")
    return [name for name in dict.fromkeys(found) if any(written.obstacles(name))]


# --- paths -----------------------------------------------------------------------------------------------------------


def check_output_dir(folder: str | Path, name: str = "output_dir") -> Path:
    """Whether a folder can be written, or made; nothing is made yet.

    Args:
        folder (`str` or `Path`): The folder.
        name (`str`, defaults to `"output_dir"`): Of the option that it is the value of.

    Raises:
        [`OutputFolderError`]: If it cannot.
    """
    text = os.fspath(folder)
    shown = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    if not text.strip():
        raise OutputFolderError(f"{name} '{shown}': is empty; name a folder")
    if "\0" in text or shown != text:
        raise OutputFolderError(f"{name} {shown}: must be UTF-8 text without null characters")
    absolute = os.path.abspath(text)
    if max(len(part.encode()) for part in Path(absolute).parts) > 255 or len(absolute.encode()) > 4096 - _ROOM:
        raise OutputFolderError(
            f"{name} {shown[:60]}...: is too long; a name may have 255 bytes, and a whole path {4096 - _ROOM}"
        )
    try:
        place = Path(absolute)
        while not os.path.lexists(place):
            place = place.parent
        try:
            kind = os.stat(place).st_mode
        except FileNotFoundError:
            raise OutputFolderError(f"{name} {shown}: cannot be written ({place} is a dangling link)") from None
        if not stat.S_ISDIR(kind):
            raise OutputFolderError(f"{name} {shown}: cannot be written ({os.strerror(errno.ENOTDIR)})")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputFolderError(f"{name} {shown}: cannot be written ({error.strerror or error})") from None
    return Path(text)


def check_apart(output_dir: str | Path, source: str | Path, what: str) -> None:
    """Whether an output folder is neither a folder that is read nor inside it.

    Raises:
        [`OutputFolderError`]: If it is.
    """
    output, other = (Path(os.path.realpath(path)) for path in (output_dir, source))
    if output == other or other in output.parents:
        where = "is" if output == other else "is inside"
        raise OutputFolderError(f"output_dir {output_dir}: {where} {what}'s own folder; give another")


# --- what was written ------------------------------------------------------------------------------------------------


def recorded_names(folder: str | Path) -> list[str]:
    """The files that this program wrote into a folder, by their paths inside."""
    return list(_Written(Path(folder)).files)


class _Written:
    """What is known of the files that this program wrote into a folder.

    Attributes:
        runs (`dict`): Kind -> identity of the last run of that kind.
        files (`dict`): Path inside the folder -> [bytes, time of the last change in ns], or `None` for a file that the
            run at work there may still change.
    """

    def __init__(self, folder: Path):
        self.folder, self.runs, self.files = folder, {}, {}
        try:
            if (folder / RECORD).is_file():
                record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
                runs, files = dict(record["runs"]), dict(record["files"])
                if all(map(_is_state, files.values())) and all(map(_is_name, files)):
                    self.runs, self.files = runs, files
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            pass  # damaged: nothing is known to be ours

    def save(self) -> None:
        kind, run = _runs.get(os.path.realpath(self.folder), ("", None))
        if kind:
            self.runs[kind] = run
        record = {"runs": self.runs, "files": dict(sorted(self.files.items()))}
        write_text(self.folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def owns(self, path: Path) -> bool:
        """Whether a file is there as it was written."""
        state = self.files.get(self.name(path), "another's")
        return not path.is_symlink() and path.is_file() and state in (None, _state(path))

    def settle(self) -> None:
        """Notes files that could change as they are now: whoever changes them after the run makes them theirs."""
        open_files = [name for name, state in self.files.items() if state is None]
        for name in open_files:
            path = self.folder / name
            if path.is_file() and not path.is_symlink():
                self.files[name] = _state(path)
        if open_files:
            self.save()

    def obstacles(self, name: str) -> Iterator[Path]:
        """Files below a name that were written, or that a loader might take for a part of a result; links are not
        followed."""
        place = self.folder
        for part in Path(name).parts:
            place = place / part
            if place.is_symlink() or place.is_file():
                if self.owns(place) or place.is_symlink() or place.stat().st_size > 0:
                    yield place
                return
        for root, folders, files in os.walk(place):
            for path in (Path(root, name) for name in (*files, *folders)):
                if self.owns(path) or (path.suffix in _LOADED and (path.is_symlink() or not path.is_dir())):
                    yield path


def _is_state(value: Any) -> bool:
    return value is None or (isinstance(value, list) and list(map(type, value)) == [int, int])


def _is_name(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    parts = name.encode("utf-8", "surrogatepass").split(b"/")
    return name.isprintable() and ".." not in name.split("/") and all(0 < len(part) < 256 for part in parts)


def _state(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def record_written(folder: str | Path, *names: str, states: dict[str, list[int]] | None = None) -> None:
    """Remembers files of a folder as written by this program.

    Args:
        folder (`str` or `Path`): The output folder.
        names (`str`): Paths inside it, of files that the run may still change.
        states (`dict[str, list[int]]`, *optional*): Of [`states_of`], for files that are final.
    """
    written = _Written(Path(folder))
    written.files |= {**dict.fromkeys(names), **(states or {})}
    written.folder.mkdir(parents=True, exist_ok=True)
    written.save()


def states_of(folder: Path, below: Path | None = None) -> dict[str, list[int]]:
    """Path inside a folder -> [bytes, time of the last change], of all files below it or one of its folders."""
    files = sorted(path for path in (below or folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _state(path) for path in files}


def put_in_place(aside: Path, folder: Path, results: Sequence[str] = ()) -> None:
    """Moves all files of a folder into another, JSON files at its top last: one that is there says that the result is
    complete. What an earlier result left under `results`, patterns of names, makes way."""
    follow_umask(aside)
    states = states_of(aside)
    make_way(folder, [*_found(folder, results), *states])
    record_written(folder, states=states)
    for name in sorted(states, key=lambda name: ("/" not in name and name.endswith(".json"), name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, folder / name)
    shutil.rmtree(aside)


def remove_leftover(folder: Path, name: str) -> None:
    """Removes a folder that a killed run had written aside; with other files than we write in it, it is moved to
    `.replaced-1`."""
    aside = folder / name
    if not os.path.lexists(aside):
        return
    is_ours = aside.is_dir() and not aside.is_symlink()
    if is_ours and not any(_is_foreign(path) for path in aside.rglob("*")):
        shutil.rmtree(aside)
        return
    kept = _replaced_folder(folder)
    kept.mkdir()
    os.replace(aside, kept / name)
    _report_moved(folder, kept)


def _is_foreign(path: Path) -> bool:
    return path.is_symlink() or (not path.is_dir() and path.suffix not in _WRITTEN_ASIDE)


def _replaced_folder(folder: Path) -> Path:
    return next(place for n in range(1, 10**6) if not (place := folder / f".replaced-{n}").exists())


def _report_moved(folder: Path, kept: Path) -> None:
    logger.warning("%s: files that this program did not write were moved to %s", folder, kept)


def prepare_files(folder: str | Path, *names: str) -> None:
    """Makes way for files that are about to be written, and remembers them."""
    make_way(Path(folder), names)
    record_written(folder, *names)


def write_own(path: Path, text: str) -> None:
    """Writes a text in the place of one that this program wrote; another's makes way."""
    prepare_files(path.parent, path.name)
    write_text(path, text)


def check_own_file(folder: Path, path: Path, overwrite: bool = False) -> None:
    """Makes way for one file of a folder.

    Raises:
        [`OutputFolderError`]: If another's is there, and it is not to be replaced.
    """
    written = _Written(folder)
    others = [other for other in written.obstacles(written.name(path)) if not written.owns(other)]
    if others and not overwrite:
        raise OutputFolderError(f"{others[0]}: was not written by this program; give --overwrite to replace it")
    make_way(folder, [written.name(path)])


def make_way(folder: Path, names: Sequence[str]) -> None:
    """Deletes what this program wrote under these names; the rest of what is in the way it moves to `.replaced-1`."""
    written, kept = _Written(folder), None
    obstacles = {path: None for name in names for path in written.obstacles(name)}
    for path in obstacles:
        if written.owns(path):
            path.unlink()
        else:
            kept = kept or _replaced_folder(folder)
            (kept / written.name(path)).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept / written.name(path))
        written.files.pop(written.name(path), None)
    if obstacles:
        written.save()
    for parent in sorted({parent for path in obstacles for parent in path.parents if folder in parent.parents},
                         key=lambda parent: -len(parent.parts)):  # fmt: skip
        with suppress(OSError):  # it holds something else
            parent.rmdir()
    if kept:
        _report_moved(folder, kept)
