"""Compares smaller denoisers with their teacher in a table, or builds one of them from a model.

    diffusers-safe students
    diffusers-safe students --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4  # not run here
    diffusers-safe students --teacher emoji --student bk-tiny --output_dir runs/emoji-tiny

The table is computed from configs, no weights are read: parameters; multiply-accumulates of a forward pass of one
sample at the model's own resolution (convolutions, linear layers, attention); size of the weights in half precision.
With --student and --output_dir, the teacher's pipeline is saved with the student in place of its denoiser, as a stock
pipeline folder. Its images are not usable before the student is trained.
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..arguments import typed
from ..command_line import parse_dataclass
from ..embedded import check_revision, locate_model
from ..emoji import MODEL_NAME
from ..families import StoredModel, check_files, family_of_pipeline, load_pipeline
from ..families.cost import macs
from ..families.students import (
    ALIASES,
    STUDENTS,
    TEACHER_CONFIGS,
    build_student,
    fitting_students,
    known_limits,
    latent_shape,
    published_teacher,
    resolve_student,
    student_config,
)
from ..formats import result_names, save_model, written_aside
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, RESULT, check_apart, check_claim, check_output_dir, claimed


TEACHERS = (*TEACHER_CONFIGS, MODEL_NAME)
CLIP_TOKENS = 77  # the prompt's length in all of TEACHER_CONFIGS
MIB = 2**20


@typed
@dataclass
class StudentsArguments:
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: Hub id or folder of a diffusers pipeline."}
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": f"The teacher, by name: {', '.join(TEACHERS)}. Default: a table for each of them.",
            "choices": TEACHERS,
        },
    )
    student: str | None = field(
        default=None,
        metadata={
            "help": f"Student to save in --output_dir: {', '.join([*STUDENTS, *ALIASES])}.",
            "choices": [*STUDENTS, *ALIASES],
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the pipeline of --student."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the teacher on the Hub."})
    variant: str | None = field(
        default=None, metadata={"help": "Variant of the teacher's weight files, such as fp16."}
    )

    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})

    def __post_init__(self):
        name = self.pretrained_model_name_or_path
        if self.teacher is not None and name is not None:
            raise ValueError(f"teacher {self.teacher}: give it or pretrained_model_name_or_path, not both")
        if (self.student is None) != (self.output_dir is None):
            raise ValueError(f"student {self.student}, output_dir {self.output_dir}: give both or neither")
        if self.teacher == MODEL_NAME:
            self.pretrained_model_name_or_path = name = MODEL_NAME
        check_revision(self.revision, name)
        if self.student is not None:
            self.student = resolve_student(self.student)
            if name is None:
                raise ValueError(
                    f"student {self.student}: a teacher with weights is needed; give --pretrained_model_name_or_path "
                    f"or --teacher {MODEL_NAME}"
                )

    @property
    def claim(self) -> dict:
        return {"kind": RESULT, "run": "student", "replaces": result_names(), "overwrite": self.overwrite}

    @property
    def hub_arguments(self) -> dict[str, str]:
        return {} if self.revision is None else {"revision": self.revision}


@dataclass
class Teacher:
    """A teacher's name, its denoiser on the meta device, and the length of its prompts."""

    name: str
    denoiser: nn.Module
    tokens: int


def find_teachers(args: StudentsArguments) -> list[Teacher]:
    """The teachers that are asked for, from their configs.

    Raises:
        `ValueError`: If a model is not there or is none of a supported family.
    """
    name = args.pretrained_model_name_or_path
    if name is not None:
        return [_teacher_at(name, args.teacher or name, **args.hub_arguments)]
    if args.teacher is not None:
        return [Teacher(args.teacher, published_teacher(args.teacher), CLIP_TOKENS)]
    published = [Teacher(name, published_teacher(name), CLIP_TOKENS) for name in TEACHER_CONFIGS]
    return [*published, _teacher_at(MODEL_NAME, MODEL_NAME)]


def _teacher_at(path: str, name: str, **hub_arguments) -> Teacher:
    stored = StoredModel(path, **hub_arguments)
    return Teacher(name, stored.denoiser, stored.tokenizers[0].model_max_length)


def table(teacher: Teacher) -> str:
    """Markdown: what is counted, and a row for the teacher and for each student that fits it."""
    shape = latent_shape(teacher.denoiser)
    lines = [
        f"{teacher.name}: latents of {' x '.join(map(str, shape))}, {teacher.tokens} tokens",
        "",
        "| denoiser | parameters | share | GMAC | share | in fp16 | taken out |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = None
    for name in ("teacher", *fitting_students(teacher.denoiser.config)):
        denoiser, taken_out = teacher.denoiser, ""
        if name in STUDENTS:
            denoiser, taken_out = build_student(denoiser, name), STUDENTS[name].description
        count = sum(parameter.numel() for parameter in denoiser.parameters())
        cost = macs(denoiser, shape, teacher.tokens)
        whole = whole or (count, cost)
        lines.append(
            f"| {name} | {count:,} | {count / whole[0]:.1%} | {cost / 1e9:,.4g} | {cost / whole[1]:.1%} | "
            f"{2 * count / MIB:,.1f} MiB | {taken_out} |"
        )
    return "\n".join(lines)


def write_student(args: StudentsArguments) -> nn.Module:
    """Writes the teacher's pipeline with the student in it, as a stock folder, whole or not at all."""
    variant = {} if args.variant is None else {"variant": args.variant}
    pipeline = load_pipeline(args.pretrained_model_name_or_path, **args.hub_arguments, **variant)
    name = family_of_pipeline(pipeline).denoiser_name
    student = build_student(getattr(pipeline, name), args.student)
    pipeline.register_modules(**{name: student})
    with written_aside(args.output_dir) as aside:
        save_model(pipeline, aside)
    return student


def check_surroundings(args: StudentsArguments) -> None:
    """The teacher's configs, and the output folder, which is created."""
    if args.student is not None:
        name = args.pretrained_model_name_or_path
        check_files(name, f"pretrained_model_name_or_path '{name}'", args.variant)
    for teacher in find_teachers(args):
        if args.student is not None:
            student_config(teacher.denoiser.config, args.student)
        elif not fitting_students(teacher.denoiser.config):
            raise ValueError(f"{teacher.name}: none of the students ({', '.join(STUDENTS)}) fits its denoiser")
    if args.output_dir is not None:
        check_output_dir(args.output_dir)
        if Path(teacher := locate_model(args.pretrained_model_name_or_path)).is_dir():
            check_apart(args.output_dir, teacher, "the teacher")
        check_claim(args.output_dir, **args.claim)


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(StudentsArguments, __doc__, argv, prog, check_surroundings)
    with exit_with_error():
        if args.student is None:
            print("\n\n".join(map(table, find_teachers(args))))
            return
        with claimed(args.output_dir, **args.claim):
            student = write_student(args)
    count = sum(parameter.numel() for parameter in student.parameters())
    print(f"{args.student}, {count:,} parameters, in {Path(args.output_dir).resolve()}; not trained yet")
    for limit in known_limits(student):
        print(limit)
