"""Uploads an erased model or a student to the Hugging Face Hub, as --push_to_hub does at the end of a training.

    diffusers-safe push runs/sd-1.4-safe --hub_model_id user/sd-1.4-safe

The model card is written again, unless you edited it. Evaluate the model first to have the results on the card. If the
Hub cannot be reached or refuses the upload, the exit code is 3.
"""

from dataclasses import dataclass

from ..arguments import option, required, typed
from ..command_line import parse_dataclass
from ..hub import check_evaluation, check_folder, check_push, default_model_id, push_or_exit, write_benchmark
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, check_claim, claimed


@typed
@dataclass
class PushArguments:
    folder: str = required("Folder of an erased model or a student. The name --folder may be omitted.")
    hub_model_id: str | None = option(
        None, "Repository on the Hub: user/name, or a name in your own account. Default: the name of the folder."
    )
    hub_token: str | None = option(
        None, "Token for the Hub. Default: HF_TOKEN, or the one of `hf auth login`.", secret=True
    )
    hub_private: bool = option(False, "Make the repository private if it is new.")
    benchmark: str | None = option(None, "Id of the benchmark dataset on the Hub whose prompts were evaluated.")
    benchmark_tasks: list[str] = option([], "Metric for each task of --benchmark: QUANTITY=TASK_ID ...")
    overwrite: bool = option(False, OVERWRITE_HELP)


def check_surroundings(args: PushArguments) -> None:
    """Checks the folder and the Hub, and writes the results of the benchmark."""
    check_claim(args.folder)
    check_folder(args.folder)
    check_evaluation(args.folder)
    check_push(args.hub_model_id or default_model_id(args.folder), args.hub_token)
    if args.benchmark or args.benchmark_tasks:
        tasks = _tasks(args.benchmark, args.benchmark_tasks)
        with claimed(args.folder):
            write_benchmark(args.folder, args.benchmark, tasks, overwrite=args.overwrite)


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(PushArguments, __doc__, argv, prog, check_surroundings, positional="folder")
    with claimed(args.folder):
        push_or_exit(args.folder, args.hub_model_id, args.hub_token, args.hub_private)


def _tasks(benchmark: str | None, words: list[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    if not benchmark or not words or not all(name and task for name, _, task in pairs):
        raise ValueError("benchmark: needs --benchmark user/dataset and --benchmark_tasks QUANTITY=TASK_ID ...")
    return {name: task for name, _, task in pairs}
