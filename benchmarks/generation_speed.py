"""Images per second of `generate`, compared with a loop that calls the pipeline for one prompt at a time.

    python benchmarks/generation_speed.py
    python benchmarks/generation_speed.py --model CompVis/stable-diffusion-v1-4 --dtype float16  # not run here

Both save PNGs; `generate` also fingerprints the model, hashes every file and writes the manifest. The variants
alternate in each round, so that changes of the machine's speed affect all of them; ratios are computed within each
round.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_safe.arguments import option
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.emoji.scenes import OBJECTS, prompt_for
from diffusers_safe.generation.generate import generate
from diffusers_safe.generation.models import DTYPES, SteeredModel
from diffusers_safe.generation.rows import GenerationSettings, PromptRow
from diffusers_safe.messages import exit_with_error


@dataclass
class SpeedArguments:
    model: str = option(str(MODEL_FOLDER), "Folder or Hub id.")
    dtype: str = option("float32", f"Dtype of the weights: {', '.join(DTYPES)}.")
    rounds: int = option(5, "Number of timed rounds, plus one that is not counted.", at_least=1)
    images: int = option(32, "Images per variant and round.", at_least=1)
    batch_sizes: list[int] = option([1, 4, 16], "Batch sizes of `generate`.")
    num_inference_steps: int = option(25, "Number of steps of the scheduler.", at_least=1)

    def __post_init__(self):
        self.subject = SteeredModel("model", self.model, dtype=self.dtype)
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes {self.batch_sizes}: must be at least one number, each at least 1")


def one_by_one(pipeline: DiffusionPipeline, rows: list[PromptRow], folder: Path, settings: GenerationSettings) -> None:
    """A loop without this package."""
    for row in rows:
        image = pipeline(
            row.prompt,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(row.seed),
        ).images[0]
        image.save(folder / f"{row.id}.png")


def seconds(work: Callable[[Path], None]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        work(Path(folder))  # saved images are on the CPU, so no synchronisation is needed
        return time.perf_counter() - started


def main() -> None:
    args = parse_dataclass(SpeedArguments, __doc__, check=lambda args: args.subject.check())
    with exit_with_error():
        pipeline, settings = args.subject.load(GenerationSettings(args.num_inference_steps))
    pipeline.set_progress_bar_config(disable=True)
    rows = [
        PromptRow(f"{number:04}", prompt_for(OBJECTS[number % len(OBJECTS)]), number) for number in range(args.images)
    ]
    variants = {"one prompt per call": lambda folder: one_by_one(pipeline, rows, folder, settings)}
    for size in args.batch_sizes:
        variants[f"`generate`, batches of {size}"] = lambda folder, size=size: generate(
            pipeline, rows, folder, settings, size
        )

    times = {name: [] for name in variants}
    for turn in tqdm(range(args.rounds + 1), "rounds"):
        for name, work in variants.items():
            spent = seconds(work)
            if turn > 0:
                times[name].append(spent)
    first = np.array(next(iter(times.values())))
    print("| | images/s, median [min, max] | ratio, median [min, max] |\n|---|---|---|")
    for name, spent in times.items():
        print(f"| {name} | {_spread(args.images / np.array(spent))} | {_spread(first / np.array(spent))} |")
    how = f"{args.images} images, {args.num_inference_steps} steps, {args.dtype}, {PartialState().device}"
    print(f"\n{args.rounds} rounds, {how}, {torch.get_num_threads()} threads.")


def _spread(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} [{values.min():.2f}, {values.max():.2f}]"


if __name__ == "__main__":
    main()
