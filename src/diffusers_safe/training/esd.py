"""ESD as a command: `accelerate launch train_esd.py`, or `-m diffusers_safe.training.esd` once installed."""

from ..erasure.arguments import ESDArguments
from ..erasure.run import run_command


DESCRIPTION = (
    "Erases concepts from a Stable Diffusion model by Erasing Concepts from Diffusion (ESD, arXiv 2303.07345)."
)


def main(argv: list[str] | None = None) -> None:
    run_command(ESDArguments, DESCRIPTION, argv)


if __name__ == "__main__":
    main()
