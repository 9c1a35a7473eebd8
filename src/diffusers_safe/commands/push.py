"""Publishes an erased model, or a student, on the Hugging Face Hub: what --push_to_hub does, later.

    diffusers-safe push runs/sd-1.4-safe --hub_model_id user/sd-1.5-safe

The folder's model card is made anew, unless you edited it: evaluate first, and the card shows the numbers. If the Hub
cannot be reached or refuses, the exit code is 3.
"""

import argparse

from ..arguments import tell_errors_in_one_line
from ..hub import check_folder, check_push, default_model_id, push_or_exit, write_benchmark


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tell_errors_in_one_line(parser)
    parser.add_argument("folder", help="Output folder of a training.")
    parser.add_argument(
        "--hub_model_id", help="user/name, or a name in your own account. (default: the name of the folder)"
    )
    parser.add_argument("--hub_token", help="(default: HF_TOKEN, or the one of `hf auth login`)")
    parser.add_argument("--hub_private", action="store_true", help="Make the repository private, if it is a new one.")
    parser.add_argument("--benchmark", help="Id of a benchmark dataset on the Hub that the evaluation is one of.")
    parser.add_argument(
        "--benchmark_tasks",
        nargs="+",
        default=[],
        metavar="QUANTITY=TASK_ID",
        help="Which number is which task of it.",
    )
    args = parser.parse_args(argv)
    try:
        check_folder(args.folder)
        check_push(args.hub_model_id or default_model_id(args.folder), args.hub_token)
        if args.benchmark or args.benchmark_tasks:
            write_benchmark(args.folder, args.benchmark, _tasks(args.benchmark, args.benchmark_tasks))
    except ValueError as error:
        parser.error(str(error))
    push_or_exit(args.folder, args.hub_model_id, args.hub_token, args.hub_private)


def _tasks(benchmark: str | None, words: list[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    if not benchmark or not words or not all(name and task for name, _, task in pairs):
        raise ValueError("benchmark: needs --benchmark user/dataset and --benchmark_tasks QUANTITY=TASK_ID ...")
    return {name: task for name, _, task in pairs}
