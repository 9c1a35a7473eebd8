"""`python -m diffusers_safe.training.esd`, the name of earlier versions of `diffusers-safe erase --method esd`."""

from ..messages import exit_with_error, importing


@exit_with_error()
def main(argv: list[str] | None = None) -> None:
    with importing():  # here, because it imports torch
        from ..erasure.run import run_command

    run_command("esd", argv)


if __name__ == "__main__":
    main()
