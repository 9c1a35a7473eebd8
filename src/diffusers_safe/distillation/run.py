"""From a teacher and captioned pictures to a smaller student: what `train_distill.py` runs."""

import inspect
import logging
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from ..arguments import exit_with_error, parse_dataclass
from ..comparison.evaluate import LoadedModel, ModelSource
from ..concepts import names_concept
from ..families import ModelFamily, StoredModel, load_pipeline, make_family
from ..families.cost import macs
from ..families.students import build_student
from ..formats import load_unet
from ..generation.generate import GenerationSettings
from ..hub import push_or_exit
from ..output_folders import record_written
from ..provenance import Distillation, erasure_of, stored_path
from ..report.grid import GRID_NAME, save_grid
from ..training.environment import make_accelerator, restore_forward
from ..training.options import ModelOptions
from ..training.output import save_student
from ..training.pictures import (
    CachedLatents,
    CaptionedImages,
    EncodedLatents,
    LatentCache,
    LatentSource,
    Preprocessing,
    make_pictures,
    open_dataset,
)
from ..training.samples import Samples, Validation
from .evaluation import FinalEvaluation, StoredPipeline
from .loop import DistillationLoop
from .options import DataOptions, DistillationOptions
from .plan import make_plan


logger = logging.getLogger(__name__)
MOST_PROMPTS = 4  # of the grid, where no validation prompts are given
DESCRIPTION = "Distils a Stable Diffusion model into a smaller one (BK-SDM, arXiv 2305.15798, and its relatives)."


@exit_with_error()
def main(argv: list[str] | None = None) -> None:
    options = parse_dataclass(DistillationOptions, DESCRIPTION, argv, check=DistillationOptions.check_surroundings)
    if options.output.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(make_plan(options, int(os.environ.get("WORLD_SIZE", "1"))))
        return
    with options.claimed_output():
        _run(options)


def _run(options: DistillationOptions) -> None:
    accelerator = make_accelerator(options)
    evaluation = FinalEvaluation(options.result.evaluation) if options.result.evaluation else None
    rows = open_rows(options.data, options.model.cache_dir, options.output.seed)
    teacher = load_pipeline(options.model.pretrained_model_name_or_path, **options.model.hub_arguments)
    pipeline = distill(accelerator, teacher, rows, options)
    if evaluation is not None:
        evaluation.report(compared(pipeline.to(accelerator.device), options.model), options.output.output_dir)
    if accelerator.is_main_process:
        print(f"the student is in {options.output.output_dir}")
        if (hub := options.hub).push_to_hub:
            push_or_exit(options.output.output_dir, hub.hub_model_id, hub.hub_token, hub.hub_private)


def distill(
    accelerator: Accelerator, teacher: DiffusionPipeline, rows: CaptionedImages, options: DistillationOptions
) -> DiffusionPipeline:
    """Trains a student of a loaded pipeline on the pictures of [`open_rows`], and writes it into the output folder, a
    stock pipeline.

    Returns:
        `DiffusionPipeline`: The student's; it shares all but the UNet with the teacher's.
    """
    set_seed(options.output.seed)
    model, output = options.model, options.output
    pipeline = student_pipeline(teacher, options)
    family, own = make_family(teacher, model.resolution), make_family(pipeline, model.resolution)
    tokens = getattr(teacher, family.tokenizers[0]).model_max_length
    unets = {"student": pipeline.unet, "teacher": teacher.unet}
    record = Distillation(
        teacher=stored_path(model.pretrained_model_name_or_path),
        teacher_fingerprint="",
        teacher_erasure=erasure_of(model.pretrained_model_name_or_path, **model.index_arguments),
        student=options.student.student or stored_path(options.student.from_student),
        parameters={name: sum(parameter.numel() for parameter in unet.parameters()) for name, unet in unets.items()},
        macs={name: macs(unet.config, family.latent_shape, tokens) for name, unet in unets.items()},
        arguments={
            **options.recorded,
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        },
        revision=model.revision,
    )
    own_forward = vars(pipeline.unet).get("forward")
    data = make_latents(accelerator, family, rows, options)
    loop = DistillationLoop(accelerator, family, own, data, options)
    samples, after_step = _samples(pipeline, teacher, loop, options), None
    if options.validation.validation_prompts:
        last = options.run.max_train_steps
        validation = Validation(accelerator, samples, loop.output_weights, output.output_dir, options.validation, last)
        after_step = lambda step, _: validation.after_step(step)  # noqa: E731
    loop.run(callback=after_step)
    loop.close()
    restore_forward(pipeline.unet, own_forward)
    skipped = data.skipped()
    record.teacher_fingerprint, record.losses = loop.taught_by, loop.last_means
    record.data = {
        "samples": None if rows.streaming else len(rows),
        "dropped": dict(skipped.dropped),
        "unreadable": skipped.unreadable,
    }
    if accelerator.is_main_process:
        if told := str(skipped):
            logger.warning("data: %s", told)
        save_student(pipeline, record, output.output_dir, output.save)
        if options.hub.push_to_hub:
            if samples.last is None:  # else it is what validation has drawn after the last step
                pipeline.to(accelerator.device)
                samples.kept = data.batch(0, range(min(MOST_PROMPTS, options.run.train_batch_size))).captions
                samples.draw()
            save_grid(samples.last, output.output_dir)
            record_written(output.output_dir, GRID_NAME)
    accelerator.wait_for_everyone()
    return pipeline


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
    student = options.student
    if student.from_student is not None:
        unet = load_unet(student.from_student, subfolder="unet", **student.hub_arguments(options.model.cache_dir))
    else:
        unet = build_student(teacher.unet, student.student)
    parts = {**teacher.components, "unet": unet, "scheduler": options.scheduler_for(teacher.scheduler)}
    takes = inspect.signature(type(teacher).__init__).parameters
    settings = {name: value for name, value in teacher.config.items() if name in takes and name not in parts}
    return type(teacher)(**parts, **settings)


def open_rows(data: DataOptions, cache_dir: str | None, seed: int) -> CaptionedImages:
    """The pictures and captions of a run.

    Raises:
        `ValueError`: If there are none, or a column is missing.
    """
    return open_dataset(
        dataset_name=data.dataset_name,
        train_data_dir=data.train_data_dir,
        dataset_config_name=data.dataset_config_name,
        split=data.dataset_split,
        image_column=data.image_column,
        caption_column=data.caption_column,
        forbidden_concepts=data.forbidden_concepts,
        max_train_samples=data.max_train_samples,
        streaming=data.streaming,
        cache_dir=cache_dir,
        seed=seed,
    )


def make_latents(
    accelerator: Accelerator, family: ModelFamily, rows: CaptionedImages, options: DistillationOptions
) -> LatentSource:
    """Images and captions as latents and text states: encoded as they come, or from a cache.

    Raises:
        `ValueError`: If the cache is of something else.
    """
    data, run, seed = options.data, options.run, options.output.seed
    preprocessing = Preprocessing(
        family.picture_size, data.image_interpolation_mode, data.center_crop, data.random_flip
    )
    samples_a_step = run.train_batch_size * run.gradient_accumulation_steps * accelerator.num_processes
    if data.cache_latents:
        folder = data.cache_folder or Path(options.output.output_dir) / "cache"
        cache = LatentCache(folder, rows, preprocessing, family)
        order = (seed, samples_a_step, accelerator.device, data.proportion_empty_prompts)
        return CachedLatents(cache, *order, num_workers=data.dataloader_num_workers)
    pictures = make_pictures(
        rows,
        preprocessing,
        seed,
        samples_a_step,
        num_workers=data.dataloader_num_workers,
        proportion_empty_prompts=data.proportion_empty_prompts,
    )
    return EncodedLatents(pictures, family, accelerator.device)


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
