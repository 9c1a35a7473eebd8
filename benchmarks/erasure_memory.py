"""Peak memory of erasure training (cross-attention) with a UNet of the size of SD 1.x, random weights, float32.

    python benchmarks/erasure_memory.py
    python benchmarks/erasure_memory.py --gradient_checkpointing true

One optimizer step of SDD at batch size 1, with our loop and with the plain loop of the paper (two UNets, gradients for
all weights), each in a separate process. Requires about 20 GB. Goal: less than 60 % of the plain loop.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from plain_loop import PlainLoop
from random_models import UNETS, in_own_process, peak_bytes, random_pipeline

from diffusers_safe.arguments import option
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.loop import ErasureLoop
from diffusers_safe.families import make_family


GIB = 2**30


@dataclass
class MemoryArguments:
    size: str = option("sd-1", f"Size of the UNet: {', '.join(UNETS)}.", UNETS)
    latent_size: int = option(64, "Height and width of the latents; 64 corresponds to 512 pixels.")
    num_inference_steps: int = option(2, "Number of sampling steps; more take longer, but no more memory.", at_least=1)
    gradient_checkpointing: bool = option(False, "Use gradient checkpointing in our loop.")

    def __post_init__(self):
        if self.latent_size < 8 or self.latent_size % 8:
            raise ValueError(f"latent_size {self.latent_size}: must be a multiple of 8")


def plain_peak(args: MemoryArguments) -> tuple[int, int]:
    """Peak memory in bytes before and after the step."""
    device = Accelerator().device
    loop = PlainLoop(random_pipeline(args.size, args.latent_size), "a knife", args.num_inference_steps, device)
    before = peak_bytes(device)
    loop.train_step(0)
    return before, peak_bytes(device)


def our_peak(args: MemoryArguments) -> tuple[int, int]:
    accelerator = Accelerator()
    training = make_options(
        "sdd",
        pretrained_model_name_or_path="random",
        concepts=["a knife"],
        output_dir=None,
        num_inference_steps=args.num_inference_steps,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    family = make_family(random_pipeline(args.size, args.latent_size))
    loop = ErasureLoop(accelerator, family, training.method.objective(training.concept.concepts), training)
    before = peak_bytes(accelerator.device)
    loop.train_step(0)
    return before, peak_bytes(accelerator.device)


def main(argv: list[str] | None = None) -> None:
    args = parse_dataclass(MemoryArguments, __doc__, argv)
    print("| | ready | peak of a step | of the plain loop's |\n|---|---|---|---|")
    plain = None
    for name, measure in (("plain loop", plain_peak), ("ours", our_peak)):
        before, peak = in_own_process(measure, args)
        plain = plain or peak
        print(f"| {name} | {before / GIB:.2f} GiB | {peak / GIB:.2f} GiB | {peak / plain:.1%} |", flush=True)
    what = "allocations on the GPU" if torch.cuda.is_available() else "the whole process with Python and libraries"
    checkpointing = ", ours with gradient checkpointing" if args.gradient_checkpointing else ""
    print(f"\n{args.size}, latents {args.latent_size} x {args.latent_size}, float32, batch 1{checkpointing}; {what}.")


if __name__ == "__main__":
    main()
