"""What an optimizer step of erasure training costs, and what reuse of trajectories saves and does to the erasure.

    python benchmarks/erasure_arithmetic.py --output_dir runs/reuse
    python benchmarks/erasure_arithmetic.py --skip_erasure

First the sample-forwards of the UNet and the seconds of a step at batch size 1, with the papers' sampling: SDD as a
plain loop written from the paper, by our loop, and with trajectories reused; then ESD, whose frozen sampler allows a
pool. All ways take turns, round after round, so that a machine whose speed wanders hurts them alike; ratios are taken
within each round. Goal: with reuse at most a fifth of the forwards.

Then "weapon" is erased from the embedded model with the demo's settings, but the papers' sampling of 50 steps, once
exactly and once with reuse, and both are measured: some 30 minutes on two CPU cores. Finished trainings and images are
kept.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from erasure_table import GROUP, demo_options, erasure_table, train_demo
from plain_loop import PlainLoop
from torch import nn
from tqdm.auto import tqdm

from diffusers_safe.arguments import exit_with_error, parse_dataclass
from diffusers_safe.comparison.models import LoadedModel
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.emoji.demo import retained_prompts
from diffusers_safe.erasure.loop import ErasureLoop
from diffusers_safe.erasure.options import make_options, parse_options
from diffusers_safe.erasure.plan import make_plan
from diffusers_safe.families import make_family
from diffusers_safe.output_folders import check_claim, claimed


@dataclass
class ArithmeticArguments:
    output_dir: str | None = field(default=None, metadata={"help": "For the erasures; finished ones are kept."})
    model: str = field(default=str(MODEL_FOLDER), metadata={"help": "Folder or Hub id, for the first part."})
    rounds: int = field(default=3, metadata={"help": "How often every way is timed; the first is not counted."})
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the whole sampling schedule."})
    latents_per_trajectory: int = field(default=16, metadata={"help": "With reuse; also the steps of a round."})
    trajectory_pool: int = field(default=64, metadata={"help": "Trajectories of the pool."})
    skip_erasure: bool = field(default=False, metadata={"help": "Only count and time."})
    images_per_prompt: int = field(default=4, metadata={"help": "Images of each prompt of the erasures."})
    train_seed: int = field(default=0, metadata={"help": "Seed of the erasures."})
    image_seed: int = field(default=0, metadata={"help": "Seed of their images."})

    def __post_init__(self):
        for name in ("num_inference_steps", "latents_per_trajectory", "trajectory_pool", "images_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.rounds < 2:
            raise ValueError(f"rounds {self.rounds}: must be at least 2, the first is not counted")
        if not self.skip_erasure and self.output_dir is None:
            raise ValueError("output_dir: is missing; give it, or --skip_erasure true")


@dataclass
class Way:
    """One way to train: `step(number)` is one optimizer step. `ahead` are the forwards before the first."""

    step: Callable[[int], object]
    forwards: list[int]
    ahead: int = 0


def counted_forwards(*denoisers: nn.Module) -> list[int]:
    """A list that gets the batch size of every forward from now on."""
    rows = []
    for denoiser in denoisers:
        denoiser.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


def plain_way(args: ArithmeticArguments) -> Way:
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    loop = PlainLoop(pipeline, GROUP, args.num_inference_steps, Accelerator().device)
    return Way(loop.train_step, counted_forwards(loop.student, loop.average))


def our_way(args: ArithmeticArguments, method: str, **options) -> Way:
    options = {"num_inference_steps": args.num_inference_steps, "watch_prompts": [], **options}
    training = make_options(
        method, pretrained_model_name_or_path=args.model, concepts=[GROUP], output_dir=None, **options
    )
    family = make_family(StableDiffusionPipeline.from_pretrained(args.model))
    loop = ErasureLoop(Accelerator(), family, training.method.objective(training.concept.concepts), training)
    forwards = counted_forwards(family.denoiser)
    loop.erasing.prepare()
    ahead = sum(forwards)
    forwards.clear()
    return Way(loop.train_step, forwards, ahead)


def make_ways(args: ArithmeticArguments) -> dict[str, Way]:
    several = {"latents_per_trajectory": args.latents_per_trajectory}
    pool = {"trajectory_pool": args.trajectory_pool, **several}
    return {
        "SDD, plain loop": plain_way(args),
        "SDD, exact": our_way(args, "sdd"),
        f"SDD, {args.latents_per_trajectory} latents a trajectory": our_way(args, "sdd", **several),
        "ESD, exact": our_way(args, "esd", sampling_model="frozen"),
        f"ESD, pool of {args.trajectory_pool}": our_way(args, "esd", sampling_model="frozen", **pool),
    }


def seconds(way: Way, steps: range) -> float:
    """Mean of one step."""
    started = time.perf_counter()
    for step in steps:
        way.step(step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / len(steps)


def compare_steps(args: ArithmeticArguments) -> str:
    """The table of the first part."""
    ways, length = make_ways(args), args.latents_per_trajectory
    times = {name: [] for name in ways}
    for turn in tqdm(range(args.rounds), "rounds"):
        for name, way in ways.items():
            times[name].append(seconds(way, range(turn * length, (turn + 1) * length)))
    lines = ["| | forwards a step | times fewer | forwards ahead | s a step | times faster, median [least, most] |"]
    lines.append("|---" * 6 + "|")
    for name, way in ways.items():
        first = next(other for other in ways if other[:3] == name[:3])
        each = sum(way.forwards) / (args.rounds * length)
        fewer = sum(ways[first].forwards) / sum(way.forwards)
        faster = np.array(times[first][1:]) / np.array(times[name][1:])
        spread = f"{np.median(faster):.2f} [{faster.min():.2f}, {faster.max():.2f}]"
        spent = f"{np.median(times[name][1:]):.3f}"
        lines.append(f"| {name} | {each:.1f} | {fewer:.2f} | {way.ahead} | {spent} | {spread} |")
    how = f"batch 1, {args.num_inference_steps} sampling steps, {args.rounds - 1} rounds of {length} steps"
    return "\n".join(lines) + f"\n\n{how}, {Accelerator().device}, {torch.get_num_threads()} threads."


def compare_erasure(args: ArithmeticArguments) -> str:
    """The table of the second part, and the forwards that the two trainings take."""
    papers = {
        "num_inference_steps": args.num_inference_steps,
        "sampling_fraction": 1.0,
        "latents_per_trajectory": 1,  # the demo reuses trajectories itself
        "trajectory_pool": 0,
    }
    reuse = {"latents_per_trajectory": args.latents_per_trajectory, "trajectory_pool": args.trajectory_pool}
    models = [LoadedModel("before", StableDiffusionPipeline.from_pretrained(MODEL_FOLDER))]
    folder = Path(args.output_dir) / f"trained-{args.train_seed}"
    told = []
    for name, changes in {"exact": papers, "reuse": {**papers, **reuse}}.items():
        model = folder / f"model-{name}"
        words = [*demo_options(model, args.train_seed, changes), "--dry_run", "true"]
        forwards = sum(make_plan(parse_options("sdd", words)).forwards.values())
        started = time.monotonic()
        models.append(LoadedModel(name, train_demo(model, args.train_seed, changes)))
        told.append(f"{name}: {forwards:.1f} forwards a sample, {time.monotonic() - started:.0f} s (0: was there)")
    images = folder / f"images-{args.images_per_prompt}-{args.image_seed}"
    table = erasure_table(models, images, args.images_per_prompt, args.image_seed, retained_prompts(GROUP))
    return "\n".join([table, *told])


def main(argv: list[str] | None = None) -> None:
    def check(args: ArithmeticArguments) -> None:
        if not args.skip_erasure:
            check_claim(args.output_dir)

    args = parse_dataclass(ArithmeticArguments, __doc__, argv, check=check)
    with exit_with_error():
        print(compare_steps(args))
        if not args.skip_erasure:
            with claimed(args.output_dir):
                print("\n" + compare_erasure(args))


if __name__ == "__main__":
    main()
