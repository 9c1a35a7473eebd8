"""From a teacher and captioned images to a smaller student: what `train_distill.py` runs."""

import inspect
import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from ..arguments import typed
from ..command_line import parse_dataclass
from ..comparison.models import LoadedModel, ModelSource
from ..concepts import names_concept
from ..families import ModelFamily, StoredModel, denoiser_of, family_of_pipeline, load_pipeline, make_family
from ..families.cost import macs
from ..families.students import build_student
from ..generation.generate import GenerationSettings
from ..hub import push_or_exit, push_result
from ..messages import exit_with_error, is_first_process, num_launched
from ..progress import ProgressCallback
from ..provenance import Distillation, erasure_of, stored_path
from ..training.environment import isolated_from_caller, make_accelerator, restore_forward
from ..training.options import ModelOptions
from ..training.output import save_student
from ..training.pictures import CaptionedImages
from ..training.samples import Samples, Validation, save_card_image, with_validation
from .data import make_latents, open_rows
from .evaluation import FinalEvaluation, StoredPipeline
from .loop import DistillationLoop
from .options import DistillationOptions
from .plan import make_plan


logger = logging.getLogger(__name__)
MOST_PROMPTS = 4  # of the grid, where no validation prompts are given
DESCRIPTION = "Distils a Stable Diffusion model into a smaller one (BK-SDM, arXiv 2305.15798, and its relatives)."


@typed
def distill(
    teacher: str,
    output_dir: str,
    *,
    progress_bar: bool = True,
    callback: ProgressCallback | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """Trains a smaller student of a model on images with captions: what `train_distill.py` does, in one call.

        student = distill("runs/sd-1.4-safe", "runs/small", student="bk-small", train_data_dir="images")

    Args:
        teacher (`str`): Folder or Hub id of a pipeline of a supported family.
        output_dir (`str`): Where the student's pipeline, distillation.json, a log and checkpoints go.
        progress_bar (`bool`, defaults to `True`): Whether to show progress and time left.
        callback (`Callable[[Progress], None]`, *optional*): Called after every step with a [`Progress`]. What it
            raises ends the run; checkpoints stay.
        options: Any option of `python train_distill.py --help`, such as `student="bk-small"`, which needs
            `train_data_dir` or `dataset_name`.

    Returns:
        [`~diffusers.DiffusionPipeline`]: The student's; what it does not change it shares with the teacher's.

    Raises:
        `ValueError`: If an option or a value is unknown or out of its range, or model or data cannot be used.
        `FloatingPointError`: If the loss is not finite any more.
        [`~diffusers_safe.hub.PushError`]: If it could not be published; the result is complete on disk.
    """
    known = {"pretrained_model_name_or_path": teacher, "output_dir": output_dir}
    settings = DistillationOptions.of(**known, **options)
    if settings.output.dry_run:
        raise ValueError("dry_run: only for the command line")
    settings.check_surroundings()
    with isolated_from_caller(), settings.claimed_output():
        accelerator = make_accelerator(settings)
        pipeline = _run(accelerator, settings, progress_bar, callback)
    if (hub := settings.hub).push_to_hub and accelerator.is_main_process:
        push_result(output_dir, hub.hub_model_id, hub.hub_token, hub.hub_private)
    return pipeline


@exit_with_error()
def main(argv: list[str] | None = None) -> None:
    options = parse_dataclass(DistillationOptions, DESCRIPTION, argv, check=DistillationOptions.check_surroundings)
    output, hub = options.output, options.hub
    if output.dry_run:
        if is_first_process():
            print(make_plan(options, num_launched()))
        return
    with options.claimed_output():
        accelerator = make_accelerator(options)
        _run(accelerator, options)
        if accelerator.is_main_process:
            print(f"the student is in {output.output_dir}")
            if hub.push_to_hub:
                push_or_exit(output.output_dir, hub.hub_model_id, hub.hub_token, hub.hub_private)


def _run(
    accelerator: Accelerator,
    options: DistillationOptions,
    progress_bar: bool = True,
    callback: ProgressCallback | None = None,
) -> DiffusionPipeline:
    """A distillation and, if it was asked for, the evaluation at its end."""
    evaluation = FinalEvaluation(options.result.evaluation) if options.result.evaluation else None
    rows = open_rows(options.data, options.model.cache_dir, options.output.seed)
    teacher = load_pipeline(options.model.pretrained_model_name_or_path, **options.model.hub_arguments)
    pipeline = train_student(accelerator, teacher, rows, options, progress_bar, callback)
    if evaluation is not None:
        evaluation.report(compared(pipeline.to(accelerator.device), options.model), options.output.output_dir)
    return pipeline


def train_student(
    accelerator: Accelerator,
    teacher: DiffusionPipeline,
    rows: CaptionedImages,
    options: DistillationOptions,
    progress_bar: bool = True,
    callback: ProgressCallback | None = None,
) -> DiffusionPipeline:
    """Trains a student of a loaded pipeline on the images of [`open_rows`], and writes its pipeline into the output
    folder.

    Returns:
        `DiffusionPipeline`: The student's; it shares all but the denoiser with the teacher's.
    """
    set_seed(options.output.seed)
    pipeline = student_pipeline(teacher, options)
    size = options.model.resolution
    family, own = make_family(teacher, size), make_family(pipeline, size)
    record = _make_record(accelerator, family, own, options)
    own_forward = vars(own.denoiser).get("forward")
    data = make_latents(accelerator, family, rows, options)
    loop = DistillationLoop(accelerator, family, own, data, options)
    samples = _samples(pipeline, teacher, loop, options)
    loop.run(progress_bar, with_validation(_validation(loop, samples), callback))
    loop.close()
    restore_forward(own.denoiser, own_forward)
    skipped = data.skipped()
    record.teacher_fingerprint, record.losses = loop.taught_by, loop.last_means
    record.data = {
        "samples": None if rows.streaming else len(rows),
        "dropped": dict(skipped.dropped),
        "unreadable": skipped.unreadable,
    }
    if accelerator.is_main_process:
        if summary := str(skipped):
            logger.warning("data: %s", summary)
        save_student(pipeline, record, options.output.output_dir, options.output.save)
        if options.hub.push_to_hub:
            if samples.last is None:  # of captions of the data
                count = min(MOST_PROMPTS, options.run.train_batch_size)
                samples.kept = data.batch(0, range(count)).captions
            save_card_image(samples, accelerator.device, options.output.output_dir)
    accelerator.wait_for_everyone()
    return pipeline


def _make_record(
    accelerator: Accelerator, teacher: ModelFamily, student: ModelFamily, options: DistillationOptions
) -> Distillation:
    """The record without what is known at the end: the losses, and counts of the data."""
    model = options.model
    tokens = getattr(teacher.pipeline, teacher.tokenizers[0]).model_max_length
    denoisers = {"student": student.denoiser, "teacher": teacher.denoiser}
    return Distillation(
        teacher=stored_path(model.pretrained_model_name_or_path),
        teacher_fingerprint="",
        teacher_erasure=erasure_of(model.pretrained_model_name_or_path, **model.index_arguments),
        student=options.student.student or stored_path(options.student.from_student),
        parameters={name: sum(map(torch.numel, part.parameters())) for name, part in denoisers.items()},
        macs={name: macs(part, teacher.latent_shape, tokens) for name, part in denoisers.items()},
        arguments={
            **options.recorded,
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        },
        revision=model.revision,
    )


def _validation(loop: DistillationLoop, samples: Samples) -> Validation | None:
    """Images of the validation prompts during the training, if there are any."""
    options = loop.options
    if not options.validation.validation_prompts:
        return None
    folder = options.output.output_dir
    return Validation(loop.accelerator, samples, loop.output_weights, folder, options.validation)


def compared(pipeline: DiffusionPipeline, model: ModelOptions) -> list[ModelSource]:
    """The models that the end of a run compares: what the teacher was erased from, if it was, teacher and student."""
    name = model.pretrained_model_name_or_path
    erasure = erasure_of(name, **model.index_arguments)
    models = [StoredPipeline("teacher", name, model.hub_arguments), LoadedModel("student", pipeline)]
    if erasure is None:
        return models
    revision = {"revision": erasure["revision"]} if erasure.get("revision") else {}
    before = StoredPipeline("teacher before its erasure", erasure["base_model"], revision)
    try:
        StoredModel(before.model, **revision)
    except ValueError as error:
        logger.warning("evaluation: without the model before the erasure (%s)", error)
        return models
    return [before, *models]


def student_pipeline(teacher: DiffusionPipeline, options: DistillationOptions) -> DiffusionPipeline:
    """The teacher's pipeline around a student: built of its blocks, or the one to go on from."""
    student, family = options.student, family_of_pipeline(teacher)
    if student.from_student is not None:
        denoiser = family.load_denoiser(student.from_student, **student.hub_arguments(options.model.cache_dir))
    else:
        denoiser = build_student(denoiser_of(teacher), student.student)
    parts = {
        **teacher.components,
        family.denoiser_name: denoiser,
        "scheduler": options.scheduler_for(teacher.scheduler),
    }
    takes = inspect.signature(type(teacher).__init__).parameters
    settings = {name: value for name, value in teacher.config.items() if name in takes and name not in parts}
    return type(teacher)(**parts, **settings)


def _samples(
    pipeline: DiffusionPipeline, teacher: DiffusionPipeline, loop: DistillationLoop, options: DistillationOptions
) -> Samples:
    prompts, names, size = (
        options.validation.validation_prompts,
        options.data.forbidden_concepts,
        options.model.resolution,
    )
    forbidden = [prompt for prompt in prompts if any(names_concept(prompt, name) for name in names)]
    learned = [prompt for prompt in prompts if prompt not in forbidden]
    settings = GenerationSettings(options.sampling.num_inference_steps, height=size, width=size)
    count, seed = options.validation.num_validation_images, options.output.seed
    return Samples(pipeline, loop.weights, forbidden, learned, count, seed, settings, teacher)


if __name__ == "__main__":
    main()
