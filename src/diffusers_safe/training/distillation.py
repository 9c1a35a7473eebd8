"""`python -m diffusers_safe.training.distillation`, an earlier name of `diffusers_safe.distillation.run`."""

from ..messages import exit_with_error, importing


@exit_with_error()
def main(argv: list[str] | None = None) -> None:
    with importing():  # here, because it imports torch
        from ..distillation.run import main

    main(argv)


if __name__ == "__main__":
    main()
