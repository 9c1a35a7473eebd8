"""`python -m diffusers_safe.training.distillation`, an earlier name of `diffusers_safe.distillation.run`."""

from ..distillation.run import main


if __name__ == "__main__":
    main()
