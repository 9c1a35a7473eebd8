"""`diffusers-safe erase`: erase concepts from a model by any method, on one device or under `accelerate launch`."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from ..arguments import read_yaml, tell_errors_in_one_line
from ..erasure.run import run_command
from ..methods import METHODS, find_method


DEFAULT = "sdd"


def main(argv: list[str], prog: str) -> None:
    listing = "\n".join(f"  {name:17} {method.summary}" for name, method in METHODS.items())
    parser = ArgumentParser(
        prog=prog,
        description=f"Erase concepts from a model.\n\nmethods:\n{listing}",
        epilog=f"The options of a method: {prog} --method {DEFAULT} --help",
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
    )
    tell_errors_in_one_line(parser)
    parser.add_argument("--method", metavar="NAME", help=f"one of {', '.join(METHODS)} (default: {DEFAULT})")
    parser.add_argument("--config", metavar="FILE", help="YAML file with options, `method` among them")
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    chosen, _ = parser.parse_known_args(argv)
    if chosen.help and chosen.method is None:
        parser.print_help()
        return
    try:
        config = read_yaml(chosen.config, "config") if chosen.config else {}
        named = config.get("method") if isinstance(config, dict) else None
        method = find_method(chosen.method or named or DEFAULT).name
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
