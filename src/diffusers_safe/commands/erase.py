"""`diffusers-safe erase`: erase concepts from a model by any method.

    diffusers-safe erase --pretrained_model_name_or_path emoji --concepts banana --output_dir runs/no-bananas
    diffusers-safe erase --method esd --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --concepts "Van Gogh" --output_dir runs/van-gogh

Each method has its own options. The second command was not run here. With several devices:
`accelerate launch -m diffusers_safe.cli erase ...`.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from ..command_line import report_errors_in_one_line
from ..erasure.recipes import find_recipe, recipes
from ..erasure.run import run_command
from ..methods import DEFAULT_METHOD, METHODS, find_method
from ..yaml_files import read_yaml


def main(argv: list[str], prog: str) -> None:
    listing = "\n".join(f"  {name:17} {method.summary}" for name, method in METHODS.items())
    parser = ArgumentParser(
        prog=prog,
        description=f"Erase concepts from a model.\n\nmethods:\n{listing}",
        epilog=f"The options of a method: {prog} --method {DEFAULT_METHOD} --help",
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
    )
    report_errors_in_one_line(parser)
    parser.add_argument("--method", metavar="NAME", help=f"one of {', '.join(METHODS)} (default: {DEFAULT_METHOD})")
    parser.add_argument("--recipe", metavar="NAME", help=f"options that ship with the package: {', '.join(recipes())}")
    parser.add_argument("--config", metavar="FILE", help="YAML file with options, `method` among them")
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    chosen, _ = parser.parse_known_args(argv)
    if chosen.help and (chosen.method, chosen.recipe, chosen.config) == (None, None, None):
        parser.print_help()
        return
    try:
        if chosen.recipe is not None:
            if chosen.config is not None:
                raise ValueError("recipe: give either --recipe or --config")
            chosen.config = str(find_recipe(chosen.recipe))
            argv = [*_without(argv, "--recipe"), "--config", chosen.config]
        config = read_yaml(chosen.config, "config") if chosen.config else {}
        named = config.get("method") if isinstance(config, dict) else None
        method = find_method(next(name for name in (chosen.method, named, DEFAULT_METHOD) if name is not None)).name
    except ValueError as error:
        parser.error(str(error))
    run_command(method, _without(argv, "--method"), f"{prog} --method {method}")


def _without(words: list[str], option: str) -> list[str]:
    """The words without an option and its value."""
    kept, skip = [], False
    for word in words:
        if skip or word == option or word.startswith(f"{option}="):
            skip = word == option and not skip
            continue
        kept.append(word)
    return kept
