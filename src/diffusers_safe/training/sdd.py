"""SDD as a command: `accelerate launch train_sdd.py`, or `-m diffusers_safe.training.sdd` once installed."""

from ..erasure.arguments import SDDArguments
from ..erasure.run import run_command


DESCRIPTION = "Erases concepts from a Stable Diffusion model by safe self-distillation (SDD, arXiv 2307.05977)."


def main(argv: list[str] | None = None) -> None:
    run_command(SDDArguments, DESCRIPTION, argv)


if __name__ == "__main__":
    main()
