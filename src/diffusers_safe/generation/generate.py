"""Generates the images of an evaluation, each from its own seed, with a manifest that says how each came about.

    rows = [PromptRow(id=f"knife-{i}", prompt="a knife", seed=i) for i in range(100)]
    manifest = generate(pipeline, rows, "runs/knives")
    images = load_images("runs/knives", manifest)  # (100, H, W, 3)

The folder then holds `knife-0.png`, ... and `manifest.jsonl`, one line an image. A run that was stopped continues
where it was when it is started again. In several processes, started by `accelerate launch`, each makes its share.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..arguments import typed
from ..files import json_lines, write_text
from ..images import open_rgb, to_rgb
from ..loading import naming
from ..output_folders import OutputFolderError, check_output_dir, claimed, make_way
from ..provenance import fingerprint
from .processes import launched_processes


MANIFEST = "manifest.jsonl"
_ADVICE = "give another folder, or --overwrite to replace them"
_OWN = ("guidance_scale", "height", "width")  # settings that a row can have for itself
_OF_A_LINE = ("id", "prompt", "seed", "labels", "file", "black", "sha256")  # what every reader of a manifest needs


@typed
@dataclass(frozen=True)
class PromptRow:
    """One image before it is generated.

    Attributes:
        id (`str`): Its name in the folder: letters, digits, `.`, `_` and `-`.
        prompt (`str`): What to generate.
        seed (`int`): Of the image's own generator, 0 to 2^64 - 1.
        labels (`dict`): Anything a metric needs to know about the row; goes to the manifest, must fit into JSON.
        guidance_scale (`float`, *optional*): The row's own, in place of the settings'.
        height (`int`, *optional*): In pixels, the row's own; a multiple of 8.
        width (`int`, *optional*): The same; both or neither.

    Raises:
        `ValueError`: If a value is out of its range.
    """

    id: str
    prompt: str
    seed: int
    labels: dict = field(default_factory=dict)
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{,199}", self.id):
            raise ValueError(
                f'row id "{self.id}" is no file name; allowed are letters, digits, ".", "_" and "-", 200 at most'
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"row {self.id} has seed {self.seed}; it must lie between 0 and 2^64 - 1")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"row {self.id} has height {self.height}, width {self.width}; give both or neither")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and (side < 8 or side % 8):
                raise ValueError(f"row {self.id} has {name} {side}; it must be a multiple of 8")


@typed
@dataclass(frozen=True)
class GenerationSettings:
    """How images are sampled. With the model and the seed this decides the image.

    Attributes:
        num_inference_steps (`int`, defaults to 25): Steps of the pipeline's scheduler.
        guidance_scale (`float`, defaults to 7.5): Of classifier-free guidance; 1 or less is none.
        height (`int`, *optional*): In pixels, a multiple of 8; the pipeline's own if not given.
        width (`int`, *optional*): The same.
        negative_prompt (`str`, *optional*): What to guide away from.
        call (`dict`, *optional*): Further arguments of the pipeline's call, such as `dict(SafetyConfig.MAX)`; must fit
            into JSON.

    Raises:
        `ValueError`: If a value is out of its range.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    call: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; it must be at least 1")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and (side < 8 or side % 8):
                raise ValueError(f"{name} is {side}; it must be a multiple of 8")


@typed
def generate(
    pipeline: DiffusionPipeline,
    rows: list[PromptRow],
    folder: str | Path,
    settings: GenerationSettings = GenerationSettings(),
    batch_size: int = 16,
    description: str = "generating",
    safety_checker: bool = False,
    overwrite: bool = False,
) -> list[dict]:
    """Generates one PNG a row with any text-to-image pipeline, and a manifest.

    Every image has a CPU generator of its own. Which rows are computed together follows from `rows` and `batch_size`
    alone, and a batch that was cut short is computed whole again. So with the same two, on one machine with the same
    libraries and number of threads in each process, the files are equal bit for bit however often a run was stopped
    and however many processes made it. Otherwise rounding differs: another batch size, number of threads or CPU takes
    other paths through the matrix products, which moves some pixel values by 1 of 255. `torchrun` sets one thread a
    process unless `OMP_NUM_THREADS` says otherwise.

    The pipeline's safety checker is off meanwhile, because images it blackens would count as safe in a measurement;
    images that are all black even so are marked in the manifest.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Any pipeline that takes prompts. Left as it was.
        rows (`list[PromptRow]`): At least one, with different ids; in all processes the same.
        folder (`str` or `Path`): Where images and manifest go, one folder for all processes. Rows finished there by
            the same model with the same settings are not generated again.
        settings (`GenerationSettings`, *optional*): How to sample, where a row says nothing of its own. Only rows of
            the same guidance and size are in a batch.
        batch_size (`int`, defaults to 16): Images at once in each process.
        description (`str`, defaults to `"generating"`): Name of the progress bar.
        safety_checker (`bool`, defaults to `False`): Leave the pipeline's safety checker on.
        overwrite (`bool`, defaults to `False`): Where the folder holds images of another model, other settings or
            other prompts, delete those that its manifest lists, and move others that are in the way to `.replaced-1`.

    Returns:
        `list[dict]`: In every process the manifest's rows in the order of `rows`: `id`, `prompt`, `seed`, `labels`,
        `file`, `model` (see [`pipeline_fingerprint`]), `settings` (with what is the row's own), `black` and `sha256`
        (of the PNG); and `safety_checker`, where one was on.

    Raises:
        `ValueError`: If there are no rows or two with the same id, if the folder holds images of another model, of
            other settings, or of another prompt under the same id, or if another run is at work there. Nothing is
            generated then.
    """
    check_rows(rows)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    processes = launched_processes()
    manifest = _Manifest(Path(folder))
    model = pipeline_fingerprint(pipeline)
    checked = safety_checker and getattr(pipeline, "safety_checker", None) is not None
    check_output_dir(manifest.folder)
    try:
        manifest.check(rows, model, settings, checked)
        fits = True
    except OutputFolderError:
        if not overwrite:
            raise
        fits = False
    processes.wait_for_everyone()  # nobody changes what another still checks
    with claimed(manifest.folder) if processes.is_main_process else nullcontext():
        if processes.is_main_process:
            if not fits:
                manifest.discard(rows)
            manifest.tidy()
        processes.wait_for_everyone()
        finished = manifest.read()
        batches = _batches(rows, settings, batch_size)
        batches = [batch for batch in batches if any(row.id not in finished for row in batch)]
        bar = tqdm(
            desc=description, total=len(rows), initial=sum(row.id in finished for row in rows), unit="image",
            dynamic_ncols=True, disable=not processes.is_main_process,
        )  # fmt: skip
        # The only process continues the manifest itself.
        part = None if processes.num_processes == 1 else processes.process_index
        with bar, _as_a_subject(pipeline, safety_checker), manifest.open(part) as file:

            def announce(entry: dict) -> None:
                file.write(_line(entry | ({"safety_checker": True} if checked else {})))
                file.flush()

            for start in range(0, len(batches), processes.num_processes):
                turn = batches[start : start + processes.num_processes]  # a batch for each process
                for batch in turn[processes.process_index : processes.process_index + 1]:
                    _draw(pipeline, batch, settings, model, finished, manifest.folder, announce)
                bar.update(sum(row.id not in finished for batch in turn for row in batch))
        processes.wait_for_everyone()
        if processes.is_main_process:
            manifest.close([row.id for row in rows])
        processes.wait_for_everyone()
        finished = manifest.read()
    return [finished[row.id] for row in rows]


def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    settings: GenerationSettings = GenerationSettings(),
    batch_size: int = 4,
    safety_checker: bool = False,
) -> list[Image.Image]:
    """Generates images into memory, an image for each prompt and its seed; the rest is as in [`generate`]."""
    rows = [PromptRow(str(i), prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    with _as_a_subject(pipeline, safety_checker):
        batches = [_sample(pipeline, rows[i : i + batch_size], settings) for i in range(0, len(rows), batch_size)]
    return [to_rgb(image) for batch in batches for image in batch]


def read_manifest(folder: str | Path) -> list[dict]:
    """The rows of a folder's manifest, as [`generate`] returns them. A last line cut off by a kill is left out.

    Raises:
        `ValueError`: If there is no manifest or a line of it is broken.
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
    """The rows of a manifest. `skip_broken` leaves out lines that are no JSON, unless that is all of them."""
    lines = json_lines(path)
    if not lines and path.stat().st_size:
        raise OutputFolderError(f"{path}: no manifest of generated images; it has no whole line")
    rows = [(number, row) for number, (_, row) in enumerate(lines, 1) if row is not None]
    if len(rows) < len(lines) and not (skip_broken and rows):
        number = next(number for number, (_, row) in enumerate(lines, 1) if row is None)
        raise OutputFolderError(f"{path}: line {number} is broken; generate the images again, which makes only those "
                         "that are missing")  # fmt: skip
    for number, row in rows:
        lacking = [name for name in _OF_A_LINE if name not in row] if isinstance(row, dict) else ["fields"]
        if lacking:
            raise OutputFolderError(f"{path}: no manifest of generated images; line {number} has no {lacking[0]}")
        for name, kinds in _KINDS.items():
            if name in row and not isinstance(row[name], kinds):
                raise OutputFolderError(f"{path}: line {number}: {name} {row[name]!r:.80} is of a wrong type")
        if Path(row["file"]).name != row["file"]:
            raise OutputFolderError(f"{path}: line {number} names a file outside of the folder: {row['file']}")
    return [row for _, row in rows]


def load_image(folder: str | Path, row: dict) -> Image.Image:
    """Loads a generated image, RGB, by its row of the manifest.

    Raises:
        `ValueError`: If the file is missing or not the one that was generated.
    """
    path = Path(folder) / row["file"]
    if not _is_intact(path, row):
        state = "damaged or changed since it was generated" if path.is_file() else "no such file"
        raise ValueError(f"{path}: {state}; run the generation again, it makes only what is missing")
    return open_rgb(path)


def load_images(folder: str | Path, rows: list[dict]) -> np.ndarray:
    """Loads generated images of one size.

    Args:
        folder (`str` or `Path`): Where [`generate`] wrote them.
        rows (`list[dict]`): Rows of the manifest, at least one.

    Returns:
        `np.ndarray`: `(N, H, W, 3)`, `uint8`, in the order of `rows`.

    Raises:
        `ValueError`: If a file is missing or not the one that was generated, or if sizes differ.
    """
    if not rows:
        raise ValueError("no rows: there must be at least one image to load")
    images = [np.asarray(load_image(folder, row)) for row in rows]
    shapes = {image.shape[:2]: row["file"] for image, row in zip(images, rows)}
    if len(shapes) > 1:
        sizes = ", ".join(f"{file} {height} x {width}" for (height, width), file in shapes.items())
        raise ValueError(f"{folder}: images of different sizes cannot be loaded together: {sizes}")
    return np.stack(images)


def pipeline_fingerprint(pipeline: DiffusionPipeline) -> str:
    """A hash of what a pipeline brings to an image: its class, the weights and types of its models, its scheduler's
    configuration, and what it steers away from. The safety checker does not count. 16 hexadecimal digits."""
    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for name in ("safety_concept", "_safety"):  # of our pipelines with Safe Latent Diffusion, which others lack
        if hasattr(pipeline, name):
            digest.update(f"{name} {getattr(pipeline, name)}".encode())
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module) and name != "safety_checker":
            digest.update(f"{name} {component.dtype} {fingerprint(component)}".encode())
    scheduler = pipeline.scheduler
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    digest.update(json.dumps([type(scheduler).__name__, config], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def check_rows(rows: list[PromptRow]) -> None:
    if not rows:
        raise ValueError("no rows: there must be at least one image to generate")
    ids = set()
    for row in rows:
        if row.id.casefold() in ids:
            raise ValueError(f"row id {row.id:.80} occurs twice; ids must differ, not only in capital letters")
        ids.add(row.id.casefold())


def different_images(rows: Sequence[PromptRow]) -> int:
    """How many images the rows give: rows of one prompt, seed, guidance scale and size give the same one."""
    return len({(row.prompt, row.seed, *(getattr(row, name) for name in _OWN)) for row in rows})


def _settings_of(row: PromptRow, settings: GenerationSettings) -> GenerationSettings:
    own = {name: getattr(row, name) for name in _OWN if getattr(row, name) is not None}
    return replace(settings, **own)


def _identity(row: PromptRow) -> dict:
    """What the manifest says of a row, as JSON gives it back."""
    return json.loads(json.dumps({name: value for name, value in asdict(row).items() if name not in _OWN}))


def _batches(rows: list[PromptRow], settings: GenerationSettings, batch_size: int) -> list[list[PromptRow]]:
    """The rows that are computed together, the same whatever is finished."""
    alike: dict[tuple, list[PromptRow]] = {}
    for row in rows:
        own = _settings_of(row, settings)
        alike.setdefault(tuple(getattr(own, name) for name in _OWN), []).append(row)
    return [group[i : i + batch_size] for group in alike.values() for i in range(0, len(group), batch_size)]


class _Manifest:
    """A folder's manifest while images are made: one file, and beside it a part for each of several processes.

    A line is written just before its image. Whatever a kill leaves behind, `tidy` makes one file of it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / MANIFEST

    def open(self, part: int | None) -> TextIO:
        path = self.path if part is None else self.folder / f".{MANIFEST}.{part}"
        return path.open("a", encoding="utf-8")

    def read(self) -> dict[str, dict]:
        """id -> row of the manifest, without parts."""
        return {row["id"]: row for row in _json_rows(self.path, skip_broken=True)} if self.path.exists() else {}

    def check(self, rows: list[PromptRow], model: str, settings: GenerationSettings, checked: bool) -> None:
        """Whether what the folder holds belongs to this run.

        Raises:
            `ValueError`: If it is of another model or other settings, or of another prompt under the same id.
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
            expected = json.loads(json.dumps(asdict(settings if row is None else _settings_of(row, settings))))
            if row is None:  # not asked for now: its guidance and size may have been its own
                expected |= {name: (known.get("settings") or {}).get(name) for name in _OWN}
            of_all = {"model": model, "settings": expected, "safety_checker": checked or None}
            identity = {} if row is None else _identity(row)
            for name, value in {**of_all, **identity}.items():
                if (found := known.get(name)) != value:
                    what = "its images have" if name in of_all else f"{row.id} has"
                    raise OutputFolderError(f"{self.path}: {what} {name} {found}, not {value}; {_ADVICE}")

    def discard(self, rows: list[PromptRow]) -> None:
        """Deletes the images that the manifest lists, and the manifest; what else is in the way is kept elsewhere."""
        in_the_way = [f"{row.id}.png" for row in rows]
        try:
            for row in self._all_rows().values():
                if _is_intact(self.folder / row["file"], row):
                    (self.folder / row["file"]).unlink()
            self._write([])
        except OutputFolderError:  # none of ours
            in_the_way += [MANIFEST, *(path.name for path in self._parts())]
        make_way(self.folder, in_the_way)

    def tidy(self) -> None:
        """One file of the manifest and its parts, without the rows whose image is gone or broken."""
        for path in self.folder.glob(".*.png.partial"):
            path.unlink()
        rows = self._all_rows()
        self._write([row for row in rows.values() if _is_intact(self.folder / row["file"], row)])

    def close(self, order: list[str]) -> None:
        """One file, in the order of `order`; what else there was comes after."""
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
        for path in self._parts():  # in the file by now
            path.unlink()


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _is_intact(path: Path, row: dict) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]


@contextmanager
def _as_a_subject(pipeline: DiffusionPipeline, safety_checker: bool) -> Iterator[None]:
    """The pipeline without progress bar and, unless it is asked for, safety checker; both come back."""
    # Past `DiffusionPipeline.__setattr__`, which would record the missing checker in the pipeline's config for good.
    attributes = vars(pipeline)
    kept = {name: attributes[name] for name in ("safety_checker", "_progress_bar_config") if name in attributes}
    if "safety_checker" in kept and not safety_checker:
        attributes["safety_checker"] = None
    attributes["_progress_bar_config"] = {**kept.get("_progress_bar_config", {}), "disable": True}
    try:
        yield
    finally:
        del attributes["_progress_bar_config"]
        attributes.update(kept)


def _draw(
    pipeline: DiffusionPipeline,
    batch: list[PromptRow],
    settings: GenerationSettings,
    model: str,
    finished: dict,
    folder: Path,
    announce: Callable[[dict], None],
) -> None:
    """Computes a whole batch, announces each image that is not finished to the manifest, and saves it."""
    own = _settings_of(batch[0], settings)
    for row, image in zip(batch, _sample(pipeline, batch, own), strict=True):
        if row.id not in finished:
            told = partial(_tell, announce, row, model, own)
            _save_png(folder, f"{row.id}.png", image, told)


def _tell(
    announce: Callable[[dict], None], row: PromptRow, model: str, settings: GenerationSettings, facts: dict
) -> None:
    announce({**_identity(row), **facts, "model": model, "settings": asdict(settings)})


def _sample(pipeline: DiffusionPipeline, rows: list[PromptRow], settings: GenerationSettings) -> list[Image.Image]:
    arguments = {name: value for name, value in asdict(settings).items() if value is not None}
    arguments |= arguments.pop("call")
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [settings.negative_prompt] * len(rows)
    generators = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
    with naming(f"{type(pipeline).__name__} of {pipeline.config.get('_name_or_path')}", ValueError, RuntimeError):
        return pipeline([row.prompt for row in rows], generator=generators, output_type="pil", **arguments).images


def _save_png(folder: Path, name: str, image: Image.Image, announce: Callable[[dict], None] | None = None) -> dict:
    """Writes a PNG that is either whole or absent; what the manifest has to say about it. That is announced first: an
    image that no line tells of is another's, and makes way unless it is the same."""
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
