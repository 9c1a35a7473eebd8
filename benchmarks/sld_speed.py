"""The cost of Safe Latent Diffusion: seconds per image and peak memory, compared with classifier-free guidance.

    python benchmarks/sld_speed.py
    python benchmarks/sld_speed.py --model CompVis/stable-diffusion-v1-4 --dtype float16  # not run here

The variants alternate in each round, so that changes of the machine's speed affect all of them; ratios are computed
within each round. Goal: at most 1.55 times the time of plain guidance for MAX, less for WEAK.
"""

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_safe import enable_safe_latent_diffusion
from diffusers_safe.arguments import option
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.generation.models import DTYPES, load_any_pipeline
from diffusers_safe.messages import exit_with_error
from diffusers_safe.pipelines.guidance import SAFETY_CONFIGS


@dataclass
class SpeedArguments:
    model: str = option(str(MODEL_FOLDER), "Folder or Hub id.")
    dtype: str = option("float32", f"Dtype of the weights: {', '.join(DTYPES)}.", DTYPES)
    rounds: int = option(10, "Number of timed rounds, plus one that is not counted.", at_least=1)
    batch_size: int = option(4, "Images per batch.", at_least=1)
    num_inference_steps: int = option(50, "Number of steps of the scheduler.", at_least=1)


def seconds(pipeline, args: SpeedArguments, call: dict) -> float:
    on_gpu = pipeline.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    pipeline(
        ["a cat"] * args.batch_size, num_inference_steps=args.num_inference_steps, generator=generator,
        output_type="pt", **call,
    )  # fmt: skip
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / args.batch_size


def load_variants(args: SpeedArguments) -> dict[str, tuple[DiffusionPipeline, dict]]:
    """The pipeline of each variant, and the arguments of its calls."""
    plain = load_any_pipeline(args.model, DTYPES[args.dtype]).to(PartialState().device)
    safe = enable_safe_latent_diffusion(type(plain).from_pipe(plain), "a weapon")
    for each in (plain, safe):
        each.set_progress_bar_config(disable=True)
    return {"guidance": (plain, {}), **{name: (safe, dict(config)) for name, config in SAFETY_CONFIGS.items()}}


def peak_mib(args: SpeedArguments, name: str) -> float:
    """Peak memory of a variant; must be called in a new process."""
    pipeline, call = load_variants(args)[name]
    seconds(pipeline, args, call)
    if pipeline.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    args = parse_dataclass(SpeedArguments, __doc__)
    with exit_with_error():
        variants = load_variants(args)
    times = {name: [] for name in variants}
    for turn in tqdm(range(args.rounds + 1), "rounds"):
        for name, (pipeline, call) in variants.items():
            spent = seconds(pipeline, args, call)
            if turn > 0:
                times[name].append(spent)
    memory = {}
    for name in variants:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            memory[name] = process.submit(peak_mib, args, name).result()
    print("| | s/image | ratio to plain guidance, median [min, max] | peak memory |\n|---|---|---|---|")
    for name, spent in times.items():
        ratio = np.array(spent) / np.array(times["guidance"])
        spread = f"{np.median(ratio):.2f} [{ratio.min():.2f}, {ratio.max():.2f}]"
        print(f"| {name} | {np.median(spent):.3f} | {spread} | {memory[name]:.0f} MiB |")
    how = f"batch {args.batch_size}, {args.num_inference_steps} steps, {args.dtype}, {PartialState().device}"
    print(f"\n{args.rounds} rounds, {how}; memory of a whole process (on a GPU: of its allocations).")


if __name__ == "__main__":
    main()
