"""`python -m diffusers_safe.training.esd`, the name of earlier versions of `diffusers-safe erase --method esd`."""

from ..erasure.run import run_command


def main(argv: list[str] | None = None) -> None:
    run_command("esd", argv)


if __name__ == "__main__":
    main()
