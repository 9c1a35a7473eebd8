"""Time and memory of closed forms with a UNet and a text encoder of the size of SD 1.x, random weights, on the CPU.

    python benchmarks/closed_form_speed.py

Each row is an edit in a separate process: prompts encoded, solved, weights written; loading, hashing and the
measurement of what is left are not counted. CPU seconds are of all threads together. The tokenizer knows every word of
the vocabulary and of the phrasings, as CLIP's does, so nothing that would be encoded for SD 1.x is left out.
"reference UCE" repeats how the authors' script of 2025 computes: for each layer it sums outer products over the
concepts and inverts a matrix.
Requires about 8 GB. Goal: text edit erases one concept in less than 10 CPU seconds and 100 in less than 60, with at
most 1 GiB in addition to the model.
"""

import re
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from random_models import in_own_process, peak_bytes, random_pipeline

from diffusers_safe.arguments import option
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.run import IN_MEMORY, MethodRun
from diffusers_safe.methods.closed_form import NO_TEXT
from diffusers_safe.methods.text_edit import CONTEXTS
from diffusers_safe.methods.vocabulary import OBJECTS


GIB = 2**30
METHODS = ("uce", "rece", "speed", "text_edit")
REFERENCE = "reference UCE"
# Every word of the vocabulary and of the phrasings, as in CLIP's tokenizer.
KNOWN = sorted({*OBJECTS, *re.findall(r"[a-z]+", " ".join(re.sub(r"\{\w\}", "", form) for form in CONTEXTS))})


@dataclass
class ClosedFormSpeedArguments:
    methods: list[str] = option([*METHODS, REFERENCE], "Rows.", (*METHODS, REFERENCE))
    counts: list[int] = option([1, 10, 100], "How many concepts are erased at once.")
    size: str = option("sd-1", "Size of the model: sd-1, or tiny for a test.", ("sd-1", "tiny"))


def reference_uce(run: MethodRun) -> None:
    """The loops of the authors' script: one matrix inverse a layer, one outer product a concept and layer."""
    family = run.family
    prompts = [*run.concepts, NO_TEXT]
    (states, _), ((_, ids),) = family.text_states(prompts), family.token_sequences(prompts)
    vectors = [state[len(one) - 2] for state, one in zip(states, ids)]
    parameters = dict(family.denoiser.named_parameters())
    with torch.no_grad():
        for name in family.text_projections(family.denoiser):
            weight = parameters[name]
            first, second = 0.5 * weight, 0.5 * torch.eye(weight.shape[1])
            for vector in vectors[:-1]:
                first = first + torch.outer(weight @ vectors[-1], vector)
                second = second + torch.outer(vector, vector)
            weight.copy_(first @ torch.inverse(second))


def measure(method: str, count: int, size: str) -> tuple[float, float, float]:
    """CPU seconds, wall seconds, and GiB in addition to the model."""
    pipeline = random_pipeline(size, text_layers=12 if size == "sd-1" else 1, words=KNOWN)
    values = {"pretrained_model_name_or_path": IN_MEMORY, "concepts": OBJECTS[:count], "output_dir": None}
    options = make_options("uce" if method == REFERENCE else method, **values)
    run = MethodRun(Accelerator(cpu=True), pipeline, options)
    before, cpu, wall = peak_bytes(run.accelerator.device), time.process_time(), time.perf_counter()
    if method == REFERENCE:
        reference_uce(run)
    else:
        options.method.erase(run)
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    return *seconds, (peak_bytes(run.accelerator.device) - before) / GIB


def main() -> None:
    args = parse_dataclass(ClosedFormSpeedArguments, __doc__)
    print(f"torch threads: {torch.get_num_threads()}")
    print("| method | concepts | CPU seconds | seconds | GiB in addition to the model |\n|---|---|---|---|---|")
    for method in args.methods:
        for count in args.counts:
            cpu, wall, memory = in_own_process(measure, method, count, args.size)
            print(f"| {method} | {count} | {cpu:.1f} | {wall:.1f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
