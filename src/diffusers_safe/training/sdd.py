"""`python -m diffusers_safe.training.sdd`, the name of earlier versions of `diffusers-safe erase --method sdd`."""

from ..messages import exit_with_error, importing


@exit_with_error()
def main(argv: list[str] | None = None) -> None:
    with importing():  # here, because it imports torch
        from ..erasure.run import run_command

    run_command("sdd", argv)


if __name__ == "__main__":
    main()
