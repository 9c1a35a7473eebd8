"""The cost of an optimizer step of erasure training, and the savings by reusing trajectories.

    python benchmarks/erasure_arithmetic.py

It counts the forward passes per sample and the seconds of a step at batch size 1 with the papers' sampling: SDD as a
plain loop written from the paper, our loop, and our loop with reused trajectories; then ESD, whose frozen sampler
allows a pool. The variants alternate in each round, so that changes of the machine's speed affect all
of them; ratios are computed within each round. Goal: with reuse at most a fifth of the forward passes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from plain_loop import PlainLoop
from torch import nn
from tqdm.auto import tqdm

from diffusers_safe.arguments import option
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.loop import ErasureLoop
from diffusers_safe.families import make_family
from diffusers_safe.messages import exit_with_error


CONCEPT = "weapon"


@dataclass
class ArithmeticArguments:
    model: str = option(str(MODEL_FOLDER), "Model: folder or Hub id.")
    rounds: int = option(3, "Number of rounds; the first is not counted.", at_least=2)
    num_inference_steps: int = option(50, "Number of steps of the sampling schedule.", at_least=1)
    latents_per_trajectory: int = option(
        16, "Latents per trajectory with reuse; also the number of steps per round.", at_least=1
    )
    trajectory_pool: int = option(64, "Number of trajectories in the pool.", at_least=1)


@dataclass
class Variant:
    """A variant of training: `step(number)` runs a step, `ahead` counts the forward passes before the first step."""

    step: Callable[[int], object]
    forwards: list[int]
    ahead: int = 0


def counted_forwards(*denoisers: nn.Module) -> list[int]:
    """A list to which the batch size of each following forward pass is appended."""
    rows = []
    for denoiser in denoisers:
        denoiser.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


def plain_variant(args: ArithmeticArguments) -> Variant:
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    loop = PlainLoop(pipeline, CONCEPT, args.num_inference_steps, Accelerator().device)
    return Variant(loop.train_step, counted_forwards(loop.student, loop.average))


def our_variant(args: ArithmeticArguments, method: str, **options) -> Variant:
    options = {"num_inference_steps": args.num_inference_steps, "watch_prompts": [], **options}
    options |= {"pretrained_model_name_or_path": args.model, "concepts": [CONCEPT], "output_dir": None}
    training = make_options(method, **options)
    family = make_family(StableDiffusionPipeline.from_pretrained(args.model))
    loop = ErasureLoop(Accelerator(), family, training.method.objective(training.concept.concepts), training)
    forwards = counted_forwards(family.denoiser)
    loop.erasing.prepare()
    ahead = sum(forwards)
    forwards.clear()
    return Variant(loop.train_step, forwards, ahead)


def make_variants(args: ArithmeticArguments) -> dict[str, Variant]:
    several = {"latents_per_trajectory": args.latents_per_trajectory}
    pool = {"trajectory_pool": args.trajectory_pool, **several}
    return {
        "SDD, plain loop": plain_variant(args),
        "SDD, exact": our_variant(args, "sdd"),
        f"SDD, {args.latents_per_trajectory} latents a trajectory": our_variant(args, "sdd", **several),
        "ESD, exact": our_variant(args, "esd", sampling_model="frozen"),
        f"ESD, pool of {args.trajectory_pool}": our_variant(args, "esd", sampling_model="frozen", **pool),
    }


def seconds(variant: Variant, steps: range) -> float:
    """Mean time of a step."""
    started = time.perf_counter()
    for step in steps:
        variant.step(step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / len(steps)


def compare_steps(args: ArithmeticArguments) -> str:
    """The table of the variants."""
    variants, length = make_variants(args), args.latents_per_trajectory
    times = {name: [] for name in variants}
    for turn in tqdm(range(args.rounds), "rounds"):
        for name, variant in variants.items():
            times[name].append(seconds(variant, range(turn * length, (turn + 1) * length)))
    lines = [
        "| | forward passes per step | times fewer | before training | s per step | times faster, median [min, max] |"
    ]
    lines.append("|---" * 6 + "|")
    for name, variant in variants.items():
        first = next(other for other in variants if other[:3] == name[:3])
        each = sum(variant.forwards) / (args.rounds * length)
        fewer = sum(variants[first].forwards) / sum(variant.forwards)
        faster = np.array(times[first][1:]) / np.array(times[name][1:])
        spread = f"{np.median(faster):.2f} [{faster.min():.2f}, {faster.max():.2f}]"
        spent = f"{np.median(times[name][1:]):.3f}"
        lines.append(f"| {name} | {each:.1f} | {fewer:.2f} | {variant.ahead} | {spent} | {spread} |")
    how = f"batch 1, {args.num_inference_steps} sampling steps, {args.rounds - 1} rounds of {length} steps"
    return "\n".join(lines) + f"\n\n{how}, {Accelerator().device}, {torch.get_num_threads()} threads."


def main(argv: list[str] | None = None) -> None:
    args = parse_dataclass(ArithmeticArguments, __doc__, argv)
    with exit_with_error():
        print(compare_steps(args))


if __name__ == "__main__":
    main()
