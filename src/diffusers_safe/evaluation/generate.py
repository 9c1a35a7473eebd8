"""Generates the images of an evaluation, each from its own seed, with a manifest that says how each came about.

    rows = [PromptRow(id=f"knife-{i}", prompt="a knife", seed=i) for i in range(100)]
    manifest = generate(pipeline, rows, "runs/knives")
    images = load_images("runs/knives", manifest)  # (100, H, W, 3)

The folder then holds `knife-0.png`, ... and `manifest.jsonl`, one line an image. A run that was stopped continues
where it was when it is started again.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..provenance import fingerprint, write_text


MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class PromptRow:
    """One image before it is generated.

    Attributes:
        id (`str`): Its name in the folder: letters, digits, `.`, `_` and `-`.
        prompt (`str`): What to generate.
        seed (`int`): Of the image's own generator, 0 to 2^64 - 1.
        labels (`dict`): Anything a metric needs to know about the row; goes to the manifest, must fit into JSON.
    """

    id: str
    prompt: str
    seed: int
    labels: dict = field(default_factory=dict)

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.id):
            raise ValueError(f'row id "{self.id}" is no file name; allowed are letters, digits, ".", "_" and "-"')
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"row {self.id} has seed {self.seed}; it must lie between 0 and 2^64 - 1")


@dataclass(frozen=True)
class GenerationSettings:
    """How images are sampled. With the model and the seed this decides the image.

    Attributes:
        num_inference_steps (`int`, defaults to 25): Steps of the pipeline's scheduler.
        guidance_scale (`float`, defaults to 7.5): Of classifier-free guidance; 1 or less is none.
        height (`int`, *optional*): In pixels; the pipeline's own if not given.
        width (`int`, *optional*): In pixels; the pipeline's own if not given.
        negative_prompt (`str`, *optional*): What to guide away from.
        call (`dict`, *optional*): Further arguments of the pipeline's call, such as `dict(SafetyConfig.MAX)`; must fit
            into JSON.
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


def generate(
    pipeline: DiffusionPipeline,
    rows: list[PromptRow],
    folder: str | Path,
    settings: GenerationSettings = GenerationSettings(),
    batch_size: int = 16,
    description: str = "generating",
    safety_checker: bool = False,
) -> list[dict]:
    """Generates one PNG a row with any text-to-image pipeline, and a manifest.

    Every image has a CPU generator of its own, so neither its neighbours nor a stop and restart touch it. What remains
    is rounding: the same image computed in a batch of another size differs by about 1e-6, which moves a few pixel
    values in a hundred thousand by 1 of 255. With the same `batch_size` and no restart, images are equal bit for bit.

    The pipeline's safety checker is off meanwhile, because images it blackens would count as safe in a measurement;
    images that are all black even so are marked in the manifest.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Any pipeline that takes prompts. Left as it was.
        rows (`list[PromptRow]`): At least one, with different ids.
        folder (`str` or `Path`): Where images and manifest go. Rows finished there by the same model with the same
            settings are not generated again.
        settings (`GenerationSettings`, *optional*): How to sample.
        batch_size (`int`, defaults to 16): Images at once.
        description (`str`, defaults to `"generating"`): Name of the progress bar.
        safety_checker (`bool`, defaults to `False`): Leave the pipeline's safety checker on.

    Returns:
        `list[dict]`: The manifest's rows in the order of `rows`: `id`, `prompt`, `seed`, `labels`, `file`, `model`
        (see [`pipeline_fingerprint`]), `settings`, `black` and `sha256` (of the PNG).

    Raises:
        `ValueError`: If there are no rows or two with the same id, or if the folder holds images of another model,
            of other settings, or of another prompt under the same id. Nothing is generated then.
    """
    check_rows(rows)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    folder = Path(folder)
    origin = {"model": pipeline_fingerprint(pipeline), "settings": json.loads(json.dumps(asdict(settings)))}
    finished = _finished_rows(folder, rows, origin)
    waiting = [row for row in rows if row.id not in finished]

    bar = tqdm(desc=description, total=len(rows), initial=len(rows) - len(waiting), unit="image", dynamic_ncols=True)
    folder.mkdir(parents=True, exist_ok=True)
    with bar, _as_a_subject(pipeline, safety_checker), (folder / MANIFEST).open("a", encoding="utf-8") as manifest:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            for row, image in zip(batch, _sample(pipeline, batch, settings), strict=True):
                finished[row.id] = {**asdict(row), **_save_png(folder, f"{row.id}.png", image), **origin}
                manifest.write(json.dumps(finished[row.id], ensure_ascii=False) + "\n")
            manifest.flush()
            bar.update(len(batch))
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
    return [image.convert("RGB") for batch in batches for image in batch]


def read_manifest(folder: str | Path) -> list[dict]:
    """The rows of a folder's manifest, as [`generate`] returns them. A last line cut off by a kill is left out.

    Raises:
        `ValueError`: If there is no manifest or a line of it is broken.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the folder holds no generated images")
    try:
        return [json.loads(line) for line in whole_lines(path)]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken manifest ({error}); delete it to generate the images again") from None


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that grows, without a last one that a kill cut off."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def load_image(folder: str | Path, row: dict) -> Image.Image:
    """Loads a generated image, RGB, by its row of the manifest.

    Raises:
        `ValueError`: If the file is missing or not the one that was generated.
    """
    path = Path(folder) / row["file"]
    if not _is_intact(path, row):
        state = "damaged or changed since it was generated" if path.is_file() else "no such file"
        raise ValueError(f"{path}: {state}; run the generation again, it makes only what is missing")
    with Image.open(path) as image:
        return image.convert("RGB")


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
        if row.id in ids:
            raise ValueError(f"row id {row.id} occurs twice; ids must be different")
        ids.add(row.id)


def _finished_rows(folder: Path, rows: list[PromptRow], origin: dict) -> dict[str, dict]:
    """What the folder already holds, id -> manifest row, after checking that it belongs to this run."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    known = {row["id"]: row for row in read_manifest(folder)}
    for name, value in origin.items():
        for row in known.values():
            if row[name] != value:
                raise ValueError(f"{path}: its images have {name} {row[name]}, not {value}; use another folder")
    for row in rows:
        for name, value in json.loads(json.dumps(asdict(row))).items():
            if row.id in known and known[row.id][name] != value:
                raise ValueError(f"{path}: {row.id} has {name} {known[row.id][name]}, not {value}; use another folder")
    intact = {row_id: row for row_id, row in known.items() if _is_intact(folder / row["file"], row)}
    # Without the rows whose image is gone, and without a line that a kill cut off.
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in intact.values()))
    return intact


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


def _sample(pipeline: DiffusionPipeline, rows: list[PromptRow], settings: GenerationSettings) -> list[Image.Image]:
    arguments = {name: value for name, value in asdict(settings).items() if value is not None}
    arguments |= arguments.pop("call")
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [settings.negative_prompt] * len(rows)
    generators = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
    return pipeline([row.prompt for row in rows], generator=generators, output_type="pil", **arguments).images


def _save_png(folder: Path, name: str, image: Image.Image) -> dict:
    """Writes a PNG that is either whole or absent; what the manifest has to say about it."""
    image = image.convert("RGB")
    png = io.BytesIO()
    image.save(png, format="PNG")
    partial = folder / f".{name}.partial"
    partial.write_bytes(png.getvalue())
    os.replace(partial, folder / name)
    return {"file": name, "black": image.getbbox() is None, "sha256": hashlib.sha256(png.getvalue()).hexdigest()}
