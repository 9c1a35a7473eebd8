"""Speed and memory of erasure training on a GPU, with a UNet of the size of SD 1.x and random weights.

    python benchmarks/erasure_gpu.py
    python benchmarks/erasure_gpu.py --batch_sizes 1 4 16 --mixed_precision no --latents_per_trajectory 16

SDD with the papers' sampling and bf16 autocast, with and without torch.compile, at several batch sizes, each in a
separate process. "Of the matrix rate" is the number of floating-point operations per second of the whole step (with
attention, without optimizer and recomputation), divided by that of a large matrix product on this device.
"""

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from random_models import UNETS, in_own_process, peak_bytes, random_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_safe.arguments import option
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.loop import ErasureLoop
from diffusers_safe.families import make_family
from diffusers_safe.training.options import MIXED_PRECISIONS


DEVICES = ("cuda", "cpu")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class GPUArguments:
    device: str = option("cuda", f"{', '.join(DEVICES)}; a CPU is only for testing the script.", DEVICES)
    size: str = option("sd-1", f"Size of the UNet: {', '.join(UNETS)}.", UNETS)
    latent_size: int = option(64, "Height and width of the latents; 64 corresponds to 512 pixels.")
    batch_sizes: list[int] = option([1, 4, 8], "Batch sizes to measure.")
    mixed_precision: str = option("bf16", f"Precision of autocast: {', '.join(MIXED_PRECISIONS)}.", MIXED_PRECISIONS)
    compile: list[str] = option(["off", "on"], "torch.compile: off, on.", ("off", "on"))
    num_inference_steps: int = option(50, "Number of steps of the sampling schedule.", at_least=1)
    latents_per_trajectory: int = option(1, "Latents per trajectory; 1 is exact.", at_least=1)
    steps: int = option(16, "Timed optimizer steps, after as many warm-up steps.", at_least=1)
    gradient_checkpointing: bool = option(False, "Recompute activations.")

    def __post_init__(self):
        if self.latent_size < 8 or self.latent_size % 8:
            raise ValueError(f"latent_size {self.latent_size}: must be a multiple of 8")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes {self.batch_sizes}: must be at least 1 each")


@dataclass
class Measured:
    """Seconds and forward passes per step, and peak memory in bytes, of one setting."""

    seconds: float
    forwards: float
    peak: int


def matrix_rate(args: GPUArguments) -> float:
    """FLOP/s of a large matrix product in the dtype of autocast; the best of several runs."""
    size = 8192 if args.device == "cuda" else 1024
    first, second = (torch.randn(size, size, device=args.device, dtype=DTYPES[args.mixed_precision]) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = now(args.device)
        for _ in range(5):
            first @ second
        best = min(best, (now(args.device) - started) / 5)
    return 2 * size**3 / best


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_loop(args: GPUArguments, batch_size: int) -> ErasureLoop:
    training = make_options(
        "sdd",
        pretrained_model_name_or_path="random",
        concepts=["a knife"],
        output_dir=None,
        num_inference_steps=args.num_inference_steps,
        latents_per_trajectory=args.latents_per_trajectory,
        train_batch_size=batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
        watch_prompts=[],
    )
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)
    family = make_family(random_pipeline(args.size, args.latent_size))
    return ErasureLoop(accelerator, family, training.method.objective(training.concept.concepts), training)


def flop_of_a_sample(args: GPUArguments) -> tuple[float, float]:
    """FLOP of one forward pass, and of the backward pass of one training sample."""
    loop = make_loop(args, 1)
    batch = loop.erasing.batch(0, range(1))
    inputs = (batch.model_input, batch.timesteps, batch.prompts)
    # On some devices, the counter does not count the matrix products of the other attention kernels.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            predicted = loop.predictor(*inputs, "student")
        with FlopCounterMode(display=False) as backward:
            predicted.square().mean().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def measure(args: GPUArguments, batch_size: int, compiled: bool) -> Measured:
    loop = make_loop(args, batch_size)
    if compiled:
        loop.predictor.family.denoiser.compile()  # in place: sampling and training both call it
    for step in range(args.steps):
        loop.train_step(step)
    before, started = loop.predictor.forwards, now(args.device)
    for step in range(args.steps, 2 * args.steps):
        loop.train_step(step)
    spent = (now(args.device) - started) / args.steps
    forwards = (loop.predictor.forwards - before) / args.steps
    return Measured(spent, forwards, peak_bytes(loop.accelerator.device))


def main(argv: list[str] | None = None) -> None:
    args = parse_dataclass(GPUArguments, __doc__, argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no GPU is available; --device cpu --size tiny tests the script")
    rate = in_own_process(matrix_rate, args)
    forward, backward = in_own_process(flop_of_a_sample, args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}: {rate / 1e12:.3g} TFLOP/s in a matrix product of {DTYPES[args.mixed_precision]}")
    print(f"a sample: forward {forward / 1e12:.3g} TFLOP, backward {backward / 1e12:.3g}\n")
    print("| batch | torch.compile | steps/s | samples/s | of the matrix rate | peak memory |")
    print("|---|---|---|---|---|---|")
    for batch_size in args.batch_sizes:
        for compiled in args.compile:
            done = in_own_process(measure, args, batch_size, compiled == "on")
            flop = done.forwards * forward + batch_size * backward
            cells = [batch_size, compiled, f"{1 / done.seconds:.3g}", f"{batch_size / done.seconds:.3g}"]
            cells += [f"{flop / done.seconds / rate:.1%}", f"{done.peak / 2**30:.2f} GiB"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
