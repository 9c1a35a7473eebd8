"""SDD as a command: `accelerate launch train_sdd.py`, or `-m diffusers_safe.training.sdd` once installed."""

from .erasure import run_command
from .erasure_arguments import SDDArguments


DESCRIPTION = "Erases concepts from a Stable Diffusion model by safe self-distillation (SDD, arXiv 2307.05977)."


def main(argv: list[str] | None = None) -> None:
    run_command(SDDArguments, DESCRIPTION, argv)


if __name__ == "__main__":
    main()
