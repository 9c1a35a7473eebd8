"""`python -m diffusers_safe.training.sdd`, the name of earlier versions of `diffusers-safe erase --method sdd`."""

from ..erasure.run import run_command


def main(argv: list[str] | None = None) -> None:
    run_command("sdd", argv)


if __name__ == "__main__":
    main()
