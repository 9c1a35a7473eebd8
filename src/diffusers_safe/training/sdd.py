"""SDD as a command: `accelerate launch train_sdd.py`, or `-m diffusers_safe.training.sdd` once installed."""

from accelerate import Accelerator

from ..arguments import told_in_one_line
from ..concepts import joined
from .arguments import SDDArguments, parse_arguments
from .erasure import erase_and_save
from .objectives import SDDObjective


DESCRIPTION = "Erases concepts from a Stable Diffusion model by safe self-distillation (SDD, arXiv 2307.05977)."


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(SDDArguments, DESCRIPTION, argv)
    with told_in_one_line():
        objective = SDDObjective(
            args.sdd_target, args.target_prompt, args.negative_guidance_scale, joined(args.concepts)
        )
        erase_and_save(Accelerator(), objective, args, args.ema_decay)


if __name__ == "__main__":
    main()
