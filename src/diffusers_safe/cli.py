"""`diffusers-safe`: one command for each thing the package does."""

import argparse
import importlib
import sys

from .command_line import package_version, report_errors_in_one_line
from .messages import exit_with_error, importing, num_launched
from .values import suggested


# command -> (module with `main(argv, prog)`, what it does); imported only when it is called
COMMANDS = {
    "demo": (
        "diffusers_safe.commands.demo",
        "erase a concept from the embedded emoji model, measure it, write a report",
    ),
    "erase": (
        "diffusers_safe.commands.erase",
        "erase concepts from a model: by text edit, SDD, ESD or another method",
    ),
    "generate": (
        "diffusers_safe.commands.generate",
        "generate images of prompts with any pipeline, with or without Safe Latent Diffusion",
    ),
    "evaluate": (
        "diffusers_safe.commands.evaluate",
        "compare models on the same prompts and seeds: images, metrics, a report",
    ),
    "attack": (
        "diffusers_safe.commands.attack",
        "attack an erased model and its original: seeds, paraphrases, concept inversion",
    ),
    "prompts": (
        "diffusers_safe.commands.prompts",
        "count the rows of a list of prompts: categories, seeds, sizes",
    ),
    "prepare-data": (
        "diffusers_safe.commands.prepare_data",
        "make training data from captions and URLs, or from a folder of images",
    ),
    "export": (
        "diffusers_safe.commands.export",
        "convert an erased model to another format: pipeline, denoiser, changed weights, LoRA",
    ),
    "students": (
        "diffusers_safe.commands.students",
        "list smaller denoisers of a model, or build one, to be trained by train_distill.py",
    ),
    "push": (
        "diffusers_safe.commands.push",
        "publish an erased model on the Hugging Face Hub, with a model card",
    ),
}
IN_SEVERAL_PROCESSES = ("erase", "generate", "evaluate")


@exit_with_error()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:13} {description}" for name, (_, description) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="diffusers-safe",
        description=f"Keep unwanted concepts out of text-to-image models.\n\ncommands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="diffusers-safe COMMAND [options]   (diffusers-safe COMMAND --help)",
    )
    report_errors_in_one_line(parser)
    parser.add_argument("--version", action="version", version=f"diffusers-safe {package_version()}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(argv[:1])
    if unknown:
        parser.error(f"unrecognized arguments: {suggested(unknown[0], ['help', 'version'])}; give a COMMAND first")
    if known.command is None:
        parser.error(f"the following arguments are required: COMMAND, one of {', '.join(COMMANDS)}")
    command = known.command.replace("_", "-")
    if command not in COMMANDS:
        meant = suggested(f"'{known.command}'", COMMANDS, "")
        parser.error(f"invalid choice: {meant}; commands are {', '.join(COMMANDS)}")
    if command not in IN_SEVERAL_PROCESSES and (count := num_launched()) > 1:
        print(f"diffusers-safe {command}: error: {count} processes were launched (see WORLD_SIZE in the environment), "
              "but it runs in one; start it without a launcher", file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    with importing():
        module = importlib.import_module(COMMANDS[command][0])
    module.main(argv[1:], f"diffusers-safe {command}")


if __name__ == "__main__":
    main()
