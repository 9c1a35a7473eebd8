"""Compares students of the embedded model with their teacher: size, speed and quality.

    python benchmarks/students.py --output_dir runs/students
    python benchmarks/students.py --output_dir runs/students --only bk-tiny "bk-tiny, task only"

All students are trained for the same number of steps on the same pictures, once with the teacher (task, output and
feature terms) and once without ("task only"). The last rows are a teacher from which all weapons were erased and its
students, on captions without weapons and on all captions. All models generate the same prompts with the same seeds.
Speed is measured in rounds in which the models alternate. Finished results are kept. At the end, the table (Markdown,
also in `table.md`) and a plot, `students.svg`, are written.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from erasure_table import Numbers
from transformers import CLIPTokenizer

from diffusers_safe.arguments import option, required
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.comparison.models import LoadedModel
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.emoji.evaluation import SETTINGS, evaluate_erasure
from diffusers_safe.emoji.scenes import group_members
from diffusers_safe.families import make_family
from diffusers_safe.families.cost import macs
from diffusers_safe.messages import exit_with_error
from diffusers_safe.output_folders import check_claim, claimed, write_own
from diffusers_safe.report.elements import Scatter
from diffusers_safe.report.plots import plot_file, scatter_svg
from diffusers_safe.report.statistics import Estimate


GROUP = "weapon"
WEAPONS = group_members(GROUP)
RECIPE = Path(__file__).parents[1] / "examples" / "emoji-student.yaml"
ERASURE = Path(__file__).parents[1] / "examples" / "emoji-weapon-sdd.yaml"
# Training on the task only is worse with the learning rate of the other rows, 2e-3.
TASK_ONLY = ["--output_weight", "0", "--feature_weight", "0", "--learning_rate", "1e-3"]
SAFE = ["--task_weight", "0", "--forbidden_concepts", *WEAPONS, GROUP]
# Name -> (student or `None`, whether the teacher is erased, other options).
ROWS: dict[str, tuple[str | None, bool, list[str]]] = {
    **{
        f"{kind}{suffix}": (kind, False, options)
        for kind in ("bk-base", "bk-small", "bk-tiny")
        for suffix, options in (("", []), (", task only", TASK_ONLY))
    },
    "erased teacher": (None, True, []),
    "bk-small of the erased teacher": ("bk-small", True, SAFE),
    "bk-small of the erased teacher, all captions": ("bk-small", True, []),
}
HEAD = [
    "| UNet | parameters | MMAC | seconds per image | weapon recognised | others recognised | change of others |",
    "|" + "---|" * 7,
]


@dataclass
class StudentsArguments:
    output_dir: str = required("Folder for all runs. Finished runs are not repeated.")
    only: list[str] = option([], "Names of rows. Default: all.", ROWS)
    num_images: int = option(8000, "Number of training pictures.", at_least=1)
    max_train_steps: int = option(1000, "Training steps of each student.", at_least=1)
    images_per_prompt: int = option(4, "Images per prompt.", at_least=1)
    rounds: int = option(5, "Rounds of the speed measurement.", at_least=1)
    seed: int = option(0, "Seed of trainings and images.", at_least=0, below=2**32)


def folder_of(args: StudentsArguments) -> Path:
    """The folder for these settings."""
    return Path(args.output_dir) / f"{args.num_images}-pictures-{args.max_train_steps}-steps-seed-{args.seed}"


def command(module: str, *words: str) -> None:
    if code := subprocess.run([sys.executable, "-m", module, *words]).returncode:
        raise SystemExit(code)


def erased_teacher(folder: Path, seed: int) -> Path:
    if not (folder / "model_index.json").exists():
        command("diffusers_safe.training.sdd", "--config", str(ERASURE), "--seed", str(seed),
                "--pretrained_model_name_or_path", str(MODEL_FOLDER), "--output_dir", str(folder),
                "--checkpointing_steps", "0", "--validation_steps", "100000")  # fmt: skip
    return folder


def student(name: str, args: StudentsArguments) -> StableDiffusionPipeline:
    """The student of a row, or its erased teacher. It is trained unless it exists."""
    kind, erased, options = ROWS[name]
    folder = folder_of(args)
    teacher = erased_teacher(folder / "models" / "erased-teacher", args.seed) if erased else MODEL_FOLDER
    if kind is None:
        return StableDiffusionPipeline.from_pretrained(teacher).to(PartialState().device)
    data, out = folder / "data", folder / "models" / name.replace(", ", "-").replace(" ", "-")
    if not (data / "train.parquet").exists():
        command("diffusers_safe.emoji.dataset", "--num_images", str(args.num_images), "--output_dir", str(data))
    if not (out / "model_index.json").exists():
        cache = folder / ("cache-safe" if "--forbidden_concepts" in options else "cache")
        command("diffusers_safe.distillation.run", "--config", str(RECIPE), "--student", kind,
                "--pretrained_model_name_or_path", str(teacher), "--train_data_dir", str(data),
                "--cache_folder", str(cache), "--output_dir", str(out), "--seed", str(args.seed),
                "--max_train_steps", str(args.max_train_steps), "--checkpointing_steps", "200", *options,
                *(["--resume_from_checkpoint", "latest"] if any(out.glob("checkpoint-*")) else []))  # fmt: skip
    return StableDiffusionPipeline.from_pretrained(out).to(PartialState().device)


def seconds_an_image(pipelines: dict[str, StableDiffusionPipeline], rounds: int) -> dict[str, list[float]]:
    """Seconds per image of each pipeline in each round: batches of 4, the steps of evaluations, with guidance."""
    seconds = {name: [] for name in pipelines}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline("a cat", num_inference_steps=2)
    for _ in range(rounds):
        for name, pipeline in pipelines.items():
            start = time.perf_counter()
            pipeline(
                ["a cat"] * 4,
                num_inference_steps=SETTINGS.num_inference_steps,
                guidance_scale=SETTINGS.guidance_scale,
            )
            seconds[name].append((time.perf_counter() - start) / 4)
    return seconds


def main() -> None:
    args = parse_dataclass(StudentsArguments, __doc__, check=lambda args: check_claim(args.output_dir))
    folder = folder_of(args)
    teacher = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER).to(PartialState().device)
    tokens = CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer").model_max_length
    pipelines = {"teacher": teacher}
    with exit_with_error(), claimed(args.output_dir):
        for name in args.only or ROWS:
            pipelines[name] = student(name, args)
        results = evaluate_erasure(
            [LoadedModel(name, pipeline) for name, pipeline in pipelines.items()],
            folder / f"images-{args.images_per_prompt}", WEAPONS, GROUP,
            images_per_object=args.images_per_prompt, seed=args.seed,
        )  # fmt: skip
        seconds = seconds_an_image(pipelines, args.rounds)
    lines, points = list(HEAD), {}
    for name, pipeline in pipelines.items():
        unet, numbers = pipeline.unet, Numbers(results, name)
        cost = macs(unet, make_family(pipeline).latent_shape, tokens)
        times = sorted(seconds[name])
        measured = f"{times[len(times) // 2]:.3f} [{times[0]:.3f}, {times[-1]:.3f}]"
        count = sum(parameter.numel() for parameter in unet.parameters())
        if "erased" not in name:
            points[name] = (Estimate(count / 1e6, count / 1e6, count / 1e6, 1, ""), numbers["others"])
        cells = [measured, numbers["concept"], numbers["others"], numbers.change("others")]
        lines.append(f"| {name} | {count:,} | {cost / 1e6:,.0f} | {' | '.join(map(str, cells))} |")
    write_own(folder / "table.md", "\n".join(lines) + "\n")
    plot = Scatter("million parameters", "others recognised", list(points.values()), ("lower", "higher"))
    write_own(folder / "students.svg", plot_file(scatter_svg(plot, list(points))))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
