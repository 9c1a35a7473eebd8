"""How good an embedded model is.

    python -m diffusers_safe.emoji.quality --model emoji --output_dir runs/quality

generates every object, group, style and background and prints how many of them the judges recognise, how well the
autoencoder reconstructs, and how fast it is.
"""

import json
import math
import platform
import re
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DiffusionPipeline

from ..arguments import exit_with_error, parse_dataclass, typed
from ..embedded import locate_model
from ..generation.generate import generate
from ..generation.manifest import load_images
from ..generation.rows import GenerationSettings, PromptRow
from ..loading import load_pipeline
from ..output_folders import OVERWRITE_HELP, check_claim, claimed, prepare_files
from ..provenance import library_versions, write_text
from ..report.results import RESULTS_NAME, write_results
from ..report.statistics import Estimate
from . import JUDGE_FOLDERS, MODEL_NAME
from .classifier import HEADS, EmojiClassifier, to_tensor
from .evaluation import SETTINGS, prompt_rows
from .render import render_many
from .scenes import BACKGROUNDS, GROUPS, OBJECTS, STYLES, Scene, is_held_out, prompt_for, shows


IMAGES_PER_GROUP = 4  # times as many as of an object
RENDER_SEED = 2**32  # more than a training's seed can be
CARD_MARKERS = ("<!-- quality:begin -->", "<!-- quality:end -->")


def evaluate_model(
    pipeline: DiffusionPipeline,
    judges: dict[str, EmojiClassifier],
    folder: str | Path,
    images_per_object: int = 8,
    seed: int = 0,
    settings: GenerationSettings = SETTINGS,
    batch_size: int = 32,
    num_renders: int = 2000,
    overwrite: bool = False,
) -> dict:
    """Measures how well a model generates what it is asked for, and how well the judges see; prints the tables.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): A text-to-image model of 64 x 64 pixels.
        judges (`dict[str, EmojiClassifier]`): By name; the first is that of the evaluations, the others check it.
        folder (`str` or `Path`): Where images and `results.json` go. A stopped run continues there.
        images_per_object (`int`, defaults to 8): Images of each `"a {object}"`, at least 1. Of each group there are
            four times as many; of each object in each style and on each background one for every 8.
        seed (`int`, defaults to 0): Every image's own seed follows from it.
        settings (`GenerationSettings`, *optional*): How to sample.
        batch_size (`int`, defaults to 32): Images at once.
        num_renders (`int`, defaults to 2000): New renders on which judges and autoencoder are tested.
        overwrite (`bool`, defaults to `False`): Replace the images and results of another model that `folder` holds.

    Returns:
        `dict`: What `results.json` holds; every share an [`Estimate`]:

        - `judges`: name of the judge -> what it recognises:
            - `objects`, `groups`, `styles`, `backgrounds`: name -> share of images recognised. Combinations held out
              of training do not count here.
            - `objects with styles`, `objects with backgrounds`: name -> share of the same images that show their
              object.
            - `mean`: the same six names -> average over the prompts; bootstrap over the prompts, of groups over
              images.
            - `held_out`: `styles`, `backgrounds` -> share of images of held-out combinations with both object and
              style (background) right.
            - `renders`: head -> accuracy on new renders.
        - `agreement`: share of all images on which all judges see the same object.
        - `autoencoder`: style (or `"all"`) -> PSNR on new renders, in dB.
        - `protocol`: settings, seeds, fingerprint, versions, black images, speed.

    Raises:
        `ValueError`: If a number is out of its range or `folder` holds images of another model or other settings.
    """
    if num_renders < 1:
        raise ValueError(f"num_renders is {num_renders}; it must be at least 1")
    folder = Path(folder)
    rows = quality_rows(images_per_object, seed)
    with claimed(folder, **_claim(images_per_object, seed, overwrite)):
        manifest = generate(pipeline, rows, folder / "images", settings, batch_size, "images", overwrite=overwrite)
    images = load_images(folder / "images", manifest)
    renders, scenes = render_many(RENDER_SEED, 0, num_renders, hold_out=False)
    results, objects = {"judges": {}}, []
    for name, judge in judges.items():
        seen = judge.classify(images)
        objects.append(seen["object"])
        results["judges"][name] = {**_recognised(rows, seen), "renders": _accuracy(judge, renders, scenes)}
    if len(judges) > 1:
        results["agreement"] = _rate(np.array([len(set(named)) == 1 for named in zip(*objects)]))
    results["autoencoder"] = autoencoder_psnr(pipeline.vae, renders, [scene.style or "plain" for scene in scenes])
    results["protocol"] = {
        "images_per_object": images_per_object,
        "images": len(rows),
        "renders": num_renders,
        "seed": seed,
        **_sampling(pipeline, settings),
        "model": manifest[0]["model"],
        "black_images": sum(row["black"] for row in manifest),
        "speed": measure_speed(pipeline, settings, batch_size),
    }
    prepare_files(folder, RESULTS_NAME)
    write_results(folder, results)
    print(quality_table(results))
    return results


def _claim(images_per_object: int, seed: int, overwrite: bool) -> dict:
    run = {"images_per_object": images_per_object, "seed": seed}

    def is_own(folder: Path) -> bool:
        try:
            protocol = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))["protocol"]
            return run.items() <= protocol.items()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    return {"kind": "quality", "run": run, "continues": (RESULTS_NAME,), "overwrite": overwrite, "is_own": is_own}


def quality_rows(images_per_object: int, seed: int) -> list[PromptRow]:
    """The prompts of [`evaluate_model`]. Each row's label `part` is the entry of the results that it counts for."""
    rows = prompt_rows([(name, prompt_for(name), {"part": "objects"}) for name in OBJECTS], images_per_object, seed)
    groups = [(group, prompt_for(group), {"part": "groups"}) for group in GROUPS]
    rows += prompt_rows(groups, IMAGES_PER_GROUP * images_per_object, seed)
    pairs = []
    for name in OBJECTS:
        for style in STYLES:
            # The prompt names no background, so held out is a style that training shows on none.
            held_out = all(is_held_out(name, background, style) for background in BACKGROUNDS)
            labels = {"part": "styles", "style": style, "held_out": held_out}
            pairs.append((name, prompt_for(name, style=style), labels))
        for background in BACKGROUNDS:
            labels = {"part": "backgrounds", "background": background, "held_out": is_held_out(name, background, None)}
            pairs.append((name, prompt_for(name, background), labels))
    return rows + prompt_rows(pairs, max(1, images_per_object // 8), seed)


def quality_table(results: dict) -> str:
    """The results of [`evaluate_model`] as Markdown: a table with a column for each judge, and sentences below."""
    judges, protocol = results["judges"], results["protocol"]
    first = next(iter(judges.values()))
    cells = {
        **{part: [f"{j['mean'][part]}; least: {_least(j[part])}" for j in judges.values()] for part in first["mean"]},
        **{
            f"object and {part.removesuffix('s')}, never seen together in training": [
                str(judge["held_out"][part]) for judge in judges.values()
            ]
            for part in first["held_out"]
        },
        **{f"{head} on renders": [str(j["renders"][head]) for j in judges.values()] for head in first["renders"]},
    }
    lines = [f"| recognised | {' | '.join(judges)} |", "|---" * (len(judges) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    sampler = f"{protocol['steps']} steps of {protocol['scheduler']}, guidance {protocol['guidance_scale']:g}"
    psnr, speed = results["autoencoder"], protocol["speed"]
    styles = ", ".join(f"{style} {value:.1f}" for style, value in psnr.items() if style != "all")
    sentences = [
        f"{sampler}, seed {protocol['seed']}, model {protocol['model']}. 95 % intervals: for averages a bootstrap "
        "over prompts (groups: over images), else Wilson.",
        f"Autoencoder on {protocol['renders']:,} new renders: PSNR {psnr['all']:.1f} dB ({styles}).",
        f"{speed['images_per_second']:.1f} images a second in batches of {speed['batch_size']}, "
        "the best of three; "
        f"{1000 * speed['seconds_per_forward']:.0f} ms a forward of the denoiser for one image with guidance "
        f"({speed['device']}, {speed['threads']} threads).",
    ]
    if "agreement" in results:
        sentences.insert(1, f"All judges see the same object on {results['agreement']} of the images.")
    return "\n\n".join(["\n".join(lines), *sentences])


def _least(shares: dict[str, Estimate]) -> str:
    name, worst = min(shares.items(), key=lambda item: item[1].value)
    return f"{name} {worst}"


def write_card(path: str | Path, results: dict) -> None:
    """Puts the table between the markers of a model card.

    Raises:
        `ValueError`: If the card does not exist or lacks the markers.
    """
    path = Path(path)
    _check_card(path)
    head, rest = path.read_text(encoding="utf-8").split(CARD_MARKERS[0], 1)
    tail = rest.split(CARD_MARKERS[1], 1)[1]
    write_text(path, f"{head}{CARD_MARKERS[0]}\n{quality_table(results)}\n{CARD_MARKERS[1]}{tail}")


def _check_card(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the card must exist and hold the lines {' and '.join(CARD_MARKERS)}")
    begin, end = (path.read_text(encoding="utf-8").find(marker) for marker in CARD_MARKERS)
    if not 0 <= begin < end:
        raise ValueError(f"{path}: holds no line {CARD_MARKERS[0]} with a line {CARD_MARKERS[1]} after it")


def _sampling(pipeline: DiffusionPipeline, settings: GenerationSettings) -> dict:
    return {
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "versions": library_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _rate(hits: np.ndarray) -> Estimate:
    return Estimate.rate(int(hits.sum()), len(hits))


def _recognised(rows: list[PromptRow], seen: dict[str, list[str]]) -> dict:
    labels = [row.labels for row in rows]
    part = np.array([label["part"] for label in labels])
    held_out = np.array([label.get("held_out", False) for label in labels])
    shown = np.array([shows(name, row.labels["subject"]) for name, row in zip(seen["object"], rows)])
    results, means, held = {}, {}, {}

    def measure(name: str, right: np.ndarray, chosen: np.ndarray, asked: np.ndarray, entries: list[str]) -> None:
        results[name] = {entry: _rate(right[chosen & (asked == entry)]) for entry in entries}
        # Images of one prompt resemble each other. The groups are too few to be drawn again themselves.
        prompts = None if name == "groups" else [row.prompt for row, take in zip(rows, chosen) if take]
        means[name] = Estimate.mean(right[chosen], prompts)

    subject = np.array([label["subject"] for label in labels])
    for name, entries in (("objects", OBJECTS), ("groups", GROUPS)):
        measure(name, shown, part == name, subject, entries)
    for name, head, entries in (("styles", "style", STYLES), ("backgrounds", "background", list(BACKGROUNDS))):
        asked = np.array([label.get(head, "") for label in labels])
        right, chosen = asked == np.array(seen[head]), (part == name) & ~held_out
        measure(name, right, chosen, asked, entries)
        measure(f"objects with {name}", shown, chosen, asked, entries)
        held[name] = _rate((right & shown)[(part == name) & held_out])
    return {**results, "mean": means, "held_out": held}


def _accuracy(judge: EmojiClassifier, renders: np.ndarray, scenes: list[Scene]) -> dict[str, Estimate]:
    truth = {
        "object": [scene.name for scene in scenes],
        "group": [scene.group for scene in scenes],
        "style": [scene.style or "plain" for scene in scenes],
        "background": [scene.background for scene in scenes],
    }
    seen = judge.classify(renders)
    return {head: _rate(np.array(seen[head]) == np.array(truth[head])) for head in HEADS}


def autoencoder_psnr(vae: AutoencoderKL, pictures: np.ndarray, styles: list[str]) -> dict[str, float]:
    """Peak signal-to-noise ratio of reconstructions, in dB: of the mean squared error over the pictures of each style
    and over all.

    Args:
        pictures (`np.ndarray`): `(N, 64, 64, 3)`, `uint8`.
        styles (`list[str]`): N names.
    """
    errors = np.square(reconstruct(vae, pictures).astype(np.float64) - pictures).mean(axis=(1, 2, 3))
    styles = np.array(styles)
    groups = {"all": slice(None), **{style: styles == style for style in dict.fromkeys(styles.tolist())}}
    return {name: round(10 * math.log10(255**2 / errors[chosen].mean()), 2) for name, chosen in groups.items()}


@torch.inference_mode()
def measure_speed(pipeline: DiffusionPipeline, settings: GenerationSettings, batch_size: int) -> dict:
    """Images a second of whole calls, and seconds of one forward of the denoiser for one image with guidance (a batch
    of two); the best of three."""
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    forwards = []

    def call(count: int) -> float:
        started = time.perf_counter()
        arguments = {"height": settings.height, "width": settings.width, "num_images_per_prompt": count}
        pipeline(
            "a cat",
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            **{name: value for name, value in arguments.items() if value is not None},
        )
        return time.perf_counter() - started

    def before(*_) -> None:
        forwards.append(-time.perf_counter())

    def after(*_) -> None:
        forwards[-1] += time.perf_counter()

    bar = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    hooks = [denoiser.register_forward_pre_hook(before), denoiser.register_forward_hook(after)]
    try:
        call(1)
        single = min(forwards)
    finally:
        for hook in hooks:
            hook.remove()
    seconds = min(call(batch_size) for _ in range(3))
    pipeline.set_progress_bar_config(**bar)
    return {
        "images_per_second": batch_size / seconds,
        "batch_size": batch_size,
        "seconds_per_forward": single,
        "device": _device_name(pipeline.device),
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray, batch_size: int = 100) -> np.ndarray:
    """Pictures `(N, 64, 64, 3)`, `uint8`, encoded and decoded again; the same shape and type."""
    restored = []
    for start in range(0, len(pictures), batch_size):
        batch = to_tensor(pictures[start : start + batch_size]).to(vae.device, vae.dtype) * 2 - 1
        decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample
        shown = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        restored.append(shown.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(restored)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return models[0] if models else platform.machine()


# --- command line ----------------------------------------------------------------------------------------------------


@typed
@dataclass
class QualityArguments:
    output_dir: str = field(metadata={"help": "Folder for images and results.json; a stopped run continues there."})
    model: str = field(default=MODEL_NAME, metadata={"help": "Name of an embedded model, or folder of a pipeline."})
    judges: list[str] = field(
        default_factory=lambda: list(map(str, JUDGE_FOLDERS)),
        metadata={"help": "Folders of judges; the first is that of the evaluations."},
    )
    images_per_object: int = field(default=8, metadata={"help": "Images of each 'a {object}'."})
    seed: int = field(default=0, metadata={"help": "Every image's own seed follows from it."})
    num_inference_steps: int = field(default=SETTINGS.num_inference_steps, metadata={"help": "Sampler steps."})
    guidance_scale: float = field(default=SETTINGS.guidance_scale, metadata={"help": "Classifier-free guidance."})
    batch_size: int = field(default=32, metadata={"help": "Images at once."})
    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})
    card: str | None = field(default=None, metadata={"help": "README.md that gets the table, between its markers."})

    def __post_init__(self):
        for name in ("images_per_object", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        folders = {locate_model(self.model): "model_index.json", **dict.fromkeys(self.judges, "config.json")}
        for folder, file in folders.items():
            if not (Path(folder) / file).is_file():
                raise ValueError(f"{folder}: no such model; the folder must hold {file}")
        if self.card is not None:
            _check_card(Path(self.card))


def check_surroundings(args: QualityArguments) -> None:
    check_claim(args.output_dir, **_claim(args.images_per_object, args.seed, args.overwrite))


def main(args: QualityArguments) -> None:
    pipeline = load_pipeline(args.model, f"model '{args.model}'", dtype=torch.float32).to(PartialState().device)
    settings = replace(SETTINGS, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    results = evaluate_model(
        pipeline,
        {Path(folder).name.replace("_", " "): EmojiClassifier.from_pretrained(folder) for folder in args.judges},
        args.output_dir,
        args.images_per_object,
        args.seed,
        settings,
        args.batch_size,
        overwrite=args.overwrite,
    )
    if args.card is not None:
        write_card(args.card, results)


if __name__ == "__main__":
    arguments = parse_dataclass(QualityArguments, __doc__, check=check_surroundings)
    with exit_with_error():
        main(arguments)
