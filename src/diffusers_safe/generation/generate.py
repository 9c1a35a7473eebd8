"""Generates images, each from its own seed, with a manifest that records how each was made.

    rows = [PromptRow(id=f"knife-{i}", prompt="a knife", seed=i) for i in range(100)]
    manifest = generate(pipeline, rows, "runs/knives")
    images = load_images("runs/knives", manifest)  # (100, H, W, 3)

The folder then holds `knife-0.png`, ... and `manifest.jsonl`, one line for each image. A stopped run continues when it
is started again. Several processes, started with `accelerate launch`, share the work.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ..arguments import typed
from ..families import family_around
from ..images import to_rgb
from ..loading import check_in_memory, dtypes_of
from ..model_errors import ModelError, naming
from ..output_folders import OutputFolderError, check_output_dir, claimed
from ..progress import ProgressBar, ProgressCallback
from ..provenance import fingerprint
from .manifest import Manifest, identity_of, save_png
from .processes import launched_processes
from .rows import OWN_SETTINGS, GenerationSettings, PromptRow, check_rows


_DEFAULTS = GenerationSettings()
_DISPENSABLE = ("safety_checker", "feature_extractor", "image_encoder")  # for images of prompts


@typed
def generate(
    pipeline: DiffusionPipeline,
    rows: list[PromptRow],
    folder: str | Path,
    settings: GenerationSettings = _DEFAULTS,
    batch_size: int = 16,
    description: str = "generating",
    safety_checker: bool = False,
    overwrite: bool = False,
    callback: ProgressCallback | None = None,
) -> list[dict]:
    """Generates one PNG for each row with any text-to-image pipeline, and a manifest.

    Every image has its own CPU generator. Which rows are computed together depends only on `rows` and `batch_size`,
    and a batch that was interrupted is computed again as a whole. With the same two, on one machine with the same
    libraries and number of threads in each process, the files are therefore equal bit for bit, however often a run was
    stopped and however many processes took part. Another batch size, number of threads or CPU changes rounding in the
    matrix products, which moves some pixel values by 1 of 255. `torchrun` sets one thread for each process unless
    `OMP_NUM_THREADS` is set.

    The pipeline's safety checker is off, because images that it blackens would count as safe in a measurement. Images
    that are all black nevertheless are marked in the manifest.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Any pipeline that takes prompts. It is unchanged afterwards.
        rows (`list[PromptRow]`): At least one, with different ids; the same in all processes.
        folder (`str` or `Path`): Folder of images and manifest, the same for all processes. Rows that the same model
            finished there with the same settings are not generated again.
        settings (`GenerationSettings`, *optional*): Sampling settings that a row does not override. A batch holds only
            rows with the same guidance scale and size.
        batch_size (`int`, defaults to 16): Number of images generated at once in each process.
        description (`str`, defaults to `"generating"`): Name of the task, for the progress bar and the callback.
        safety_checker (`bool`, defaults to `False`): Keep the pipeline's safety checker on.
        overwrite (`bool`, defaults to `False`): If the folder holds images of another model, other settings or other
            prompts, delete those in its manifest, and move other files in the way to `.replaced-1`.
        callback (`Callable[[Progress], None]`, *optional*): Called with a [`Progress`] at the start and after each
            batch, in the first process. If it raises, the run ends there: finished images are kept, and the same call
            continues with the rest.

    Returns:
        `list[dict]`: In every process, the rows of the manifest in the order of `rows`: `id`, `prompt`, `seed`,
        `labels`, `file`, `model` (see [`pipeline_fingerprint`]), `settings` (with what the row overrides), `black` and
        `sha256` (of the PNG); and `safety_checker` if it was on.

    Raises:
        `ValueError`: If there are no rows or two with the same id, if the folder holds images of another model, of
            other settings, or of another prompt under the same id, or if another run uses it; or if the pipeline would
            ignore the negative prompt. Nothing is generated then.
    """
    check_rows(rows)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    check_output_dir(folder)
    if not isinstance(pipeline, DiffusionPipeline) or getattr(pipeline, "scheduler", None) is None:
        raise ValueError(f"pipeline ({type(pipeline).__name__}): must be a DiffusionPipeline with a scheduler")
    _check_negative_prompt(pipeline, settings)
    processes = launched_processes()
    manifest = Manifest(Path(folder))
    model = pipeline_fingerprint(pipeline)
    checked = safety_checker and getattr(pipeline, "safety_checker", None) is not None
    try:
        manifest.check(rows, model, settings, checked)
        fits = True
    except OutputFolderError:
        if not overwrite:
            raise
        fits = False
    processes.wait_for_everyone()  # no process changes what another one still checks
    with claimed(manifest.folder) if processes.is_main_process else nullcontext():
        if processes.is_main_process:
            if not fits:
                manifest.discard(rows)
            manifest.tidy()
        processes.wait_for_everyone()
        done = sum(row.id in manifest.read() for row in rows)
        bar = ProgressBar(description, len(rows), done, callback=callback, hidden=not processes.is_main_process)
        facts = {"model": model, **({"safety_checker": True} if checked else {})}
        with bar, _for_measurement(pipeline, safety_checker):
            _generate_missing(pipeline, _batches(rows, settings, batch_size), settings, manifest, facts, bar)
        processes.wait_for_everyone()
        if processes.is_main_process:
            manifest.close([row.id for row in rows])
        processes.wait_for_everyone()
        finished = manifest.read()
    return [finished[row.id] for row in rows]


def _check_negative_prompt(pipeline: DiffusionPipeline, settings: GenerationSettings) -> None:
    family = family_around(pipeline)
    if family and family.guidance_name and settings.negative_prompt is not None and not settings.call:
        raise ValueError(
            f"negative_prompt '{settings.negative_prompt}': {type(pipeline).__name__} ignores it; its guidance scale "
            "is an input of the model, so there is no unconditional prediction"
        )


def _generate_missing(
    pipeline: DiffusionPipeline,
    batches: list[list[PromptRow]],
    settings: GenerationSettings,
    manifest: Manifest,
    facts: dict,
    bar: ProgressBar,
) -> None:
    """Generates the batches with a missing image. Processes take turns; the only process continues the manifest
    itself, several write a part each."""
    processes, finished = launched_processes(), manifest.read()
    waiting = [batch for batch in batches if any(row.id not in finished for row in batch)]
    part = None if processes.num_processes == 1 else processes.process_index
    with manifest.open(part) as file:
        for start in range(0, len(waiting), processes.num_processes):
            turn = waiting[start : start + processes.num_processes]  # a batch for each process
            for batch in turn[processes.process_index : processes.process_index + 1]:
                own = settings.of_row(batch[0])
                for row, image in zip(batch, _sample(pipeline, batch, own), strict=True):
                    if row.id in finished:
                        continue

                    def announce(of_file: dict, row: PromptRow = row, own: GenerationSettings = own) -> None:
                        entry = {**identity_of(row), **of_file, **facts, "settings": asdict(own)}
                        manifest.announce(file, entry)

                    save_png(manifest.folder, f"{row.id}.png", image, announce)
            bar.update(sum(row.id not in finished for batch in turn for row in batch))


def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    settings: GenerationSettings = _DEFAULTS,
    batch_size: int = 4,
    safety_checker: bool = False,
) -> list[Image.Image]:
    """Generates images into memory, one for each prompt and seed. Other arguments as in [`generate`]."""
    rows = [PromptRow(str(i), prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    with _for_measurement(pipeline, safety_checker):
        batches = [_sample(pipeline, rows[i : i + batch_size], settings) for i in range(0, len(rows), batch_size)]
    return [to_rgb(image) for batch in batches for image in batch]


def pipeline_fingerprint(pipeline: DiffusionPipeline) -> str:
    """A hash of everything in a pipeline that determines its images: its class, the weights and dtypes of its models,
    the configuration of its scheduler, and what it steers away from. It ignores the safety checker. 16 hexadecimal
    digits.

    Raises:
        `ValueError`: If weights are on the meta device.
    """
    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for name in ("safety_concept", "_safety"):  # only pipelines with Safe Latent Diffusion have them
        if hasattr(pipeline, name):
            digest.update(f"{name} {getattr(pipeline, name)}".encode())
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module) and name != "safety_checker":
            check_in_memory(component, name)
            digest.update(f"{name} {component.dtype} {fingerprint(component)}".encode())
    scheduler = pipeline.scheduler
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    digest.update(json.dumps([type(scheduler).__name__, config], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _batches(rows: list[PromptRow], settings: GenerationSettings, batch_size: int) -> list[list[PromptRow]]:
    """The rows that are computed together, independent of what is finished."""
    alike: dict[tuple, list[PromptRow]] = {}
    for row in rows:
        own = settings.of_row(row)
        alike.setdefault(tuple(getattr(own, name) for name in OWN_SETTINGS), []).append(row)
    return [group[i : i + batch_size] for group in alike.values() for i in range(0, len(group), batch_size)]


@contextmanager
def _for_measurement(pipeline: DiffusionPipeline, safety_checker: bool) -> Iterator[None]:
    """Switches off the pipeline's progress bar and, unless requested, its safety checker, and restores both."""
    # Not with `DiffusionPipeline.__setattr__`, which would permanently record the missing checker in its config.
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
    what = f"{type(pipeline).__name__} of {pipeline.config.get('_name_or_path')}"
    try:
        with naming(what, ValueError, RuntimeError):
            return pipeline([row.prompt for row in rows], generator=generators, output_type="pil", **arguments).images
    except (ModelError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or (fault := _fault(pipeline)) is None:
            raise
        raise ModelError(f"{what}: {fault}") from error


def _fault(pipeline: DiffusionPipeline) -> str | None:
    """What is wrong with the parts of a pipeline that cannot be called. Some pipelines can do without a part, or with
    one in another dtype, so this is asked only then."""
    parts = pipeline.components
    if missing := [name for name, part in parts.items() if part is None and name not in _DISPENSABLE]:
        return f"has no {missing[0]}"
    dtypes = {name: dtypes_of(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    dtypes = {name: dtype for name, dtype in dtypes.items() if name not in _DISPENSABLE}
    if len({*dtypes.values()}) < 2 and not any(" and " in dtype for dtype in dtypes.values()):
        return None
    listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
    return f"its parts have different dtypes ({listed}); give them one: pipeline.to(torch.float32)"
