"""From a teacher and captioned pictures to a smaller student: what `train_distill.py` runs."""

import inspect
import logging
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from ..arguments import exit_with_error, parse_dataclass
from ..comparison.models import LoadedModel, ModelSource
from ..concepts import names_concept
from ..erasure.plan import make_distillation_plan
from ..erasure.run import make_accelerator, restore_forward
from ..families import ModelFamily, StoredModel, load_pipeline, make_family
from ..families.cost import macs
from ..families.students import build_student
from ..formats import load_unet
from ..generation.generate import GenerationSettings
from ..hub import push_or_exit
from ..output_folders import record_written
from ..provenance import Distillation, erasure_of, stored_path
from ..report.grid import GRID_NAME, save_grid
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
from ..training.samples import MOST_PROMPTS, Samples, Validation
from .arguments import DistillationArguments
from .evaluation import FinalEvaluation, StoredPipeline
from .loop import DistillationLoop


logger = logging.getLogger(__name__)
DESCRIPTION = "Distils a Stable Diffusion model into a smaller one (BK-SDM, arXiv 2305.15798, and its relatives)."


@exit_with_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_dataclass(DistillationArguments, DESCRIPTION, argv, check=DistillationArguments.check_surroundings)
    with exit_with_error():
        if args.dry_run:
            if os.environ.get("RANK", "0") == "0":
                print(make_distillation_plan(args, int(os.environ.get("WORLD_SIZE", "1"))))
            return
        with args.claimed_output():
            _run(args)


def _run(args: DistillationArguments) -> None:
    accelerator = make_accelerator(args)
    evaluation = FinalEvaluation(args.evaluation) if args.evaluation else None
    rows = open_rows(args)
    teacher = load_pipeline(args.pretrained_model_name_or_path, **args.hub_arguments)
    pipeline = distill(accelerator, teacher, rows, args)
    if evaluation is not None:
        evaluation.report(compared(pipeline.to(accelerator.device), args), args.output_dir)
    if accelerator.is_main_process:
        print(f"the student is in {args.output_dir}")
        if args.push_to_hub:
            push_or_exit(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private)


def distill(
    accelerator: Accelerator, teacher: DiffusionPipeline, rows: CaptionedImages, args: DistillationArguments
) -> DiffusionPipeline:
    """Trains a student of a loaded pipeline on the pictures of [`open_rows`], and writes it into the output folder, a
    stock pipeline.

    Returns:
        `DiffusionPipeline`: The student's; it shares all but the UNet with the teacher's.
    """
    set_seed(args.seed)
    pipeline = student_pipeline(teacher, args)
    family, own = make_family(teacher, args.resolution), make_family(pipeline, args.resolution)
    tokens = getattr(teacher, family.tokenizers[0]).model_max_length
    unets = {"student": pipeline.unet, "teacher": teacher.unet}
    record = Distillation(
        teacher=stored_path(args.pretrained_model_name_or_path),
        teacher_fingerprint="",
        teacher_erasure=erasure_of(args.pretrained_model_name_or_path, **args.index_arguments),
        student=args.student or stored_path(args.from_student),
        parameters={name: sum(parameter.numel() for parameter in unet.parameters()) for name, unet in unets.items()},
        macs={name: macs(unet.config, family.latent_shape, tokens) for name, unet in unets.items()},
        arguments={
            **args.recorded,
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        },
        revision=args.revision,
    )
    own_forward = vars(pipeline.unet).get("forward")
    data = make_latents(accelerator, family, rows, args)
    loop = DistillationLoop(accelerator, family, own, data, args)
    samples = _samples(pipeline, teacher, loop, args)
    validation = Validation(accelerator, samples, args, loop.output_weights) if args.validation_prompts else None
    loop.run(callback=lambda step, _: validation and validation.after_step(step))
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
        save_student(pipeline, record, args.output_dir, args.save)
        if args.push_to_hub:
            if samples.last is None:  # else it is what validation has drawn after the last step
                pipeline.to(accelerator.device)
                samples.kept = data.batch(0, range(min(MOST_PROMPTS, args.train_batch_size))).captions
                samples.draw()
            save_grid(samples.last, args.output_dir)
            record_written(args.output_dir, GRID_NAME)
    accelerator.wait_for_everyone()
    return pipeline


def compared(pipeline: DiffusionPipeline, args: DistillationArguments) -> list[ModelSource]:
    """The models that the end of a run compares: what the teacher was erased from, if it was, teacher and student."""
    name = args.pretrained_model_name_or_path
    erasure = erasure_of(name, **args.index_arguments)
    models = [StoredPipeline("teacher", name, args.hub_arguments), LoadedModel("student", pipeline)]
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


def student_pipeline(teacher: DiffusionPipeline, args: DistillationArguments) -> DiffusionPipeline:
    """The teacher's pipeline around a student: built of its blocks, or the one to go on from."""
    if args.from_student is not None:
        unet = load_unet(args.from_student, subfolder="unet", **args.student_arguments)
    else:
        unet = build_student(teacher.unet, args.student)
    parts = {**teacher.components, "unet": unet, "scheduler": args.scheduler_for(teacher.scheduler)}
    takes = inspect.signature(type(teacher).__init__).parameters
    settings = {name: value for name, value in teacher.config.items() if name in takes and name not in parts}
    return type(teacher)(**parts, **settings)


def open_rows(args: DistillationArguments) -> CaptionedImages:
    """The pictures and captions of a run.

    Raises:
        `ValueError`: If there are none, or a column is missing.
    """
    return open_dataset(
        dataset_name=args.dataset_name,
        train_data_dir=args.train_data_dir,
        dataset_config_name=args.dataset_config_name,
        split=args.dataset_split,
        image_column=args.image_column,
        caption_column=args.caption_column,
        forbidden_concepts=args.forbidden_concepts,
        max_train_samples=args.max_train_samples,
        streaming=args.streaming,
        cache_dir=args.cache_dir,
        seed=args.seed,
    )


def make_latents(
    accelerator: Accelerator, family: ModelFamily, rows: CaptionedImages, args: DistillationArguments
) -> LatentSource:
    """Pictures and captions as latents and text states: encoded as they come, or from a cache.

    Raises:
        `ValueError`: If the cache is of something else.
    """
    preprocessing = Preprocessing(
        family.picture_size, args.image_interpolation_mode, args.center_crop, args.random_flip
    )
    samples_a_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.cache_latents:
        folder = args.cache_folder or Path(args.output_dir) / "cache"
        cache = LatentCache(folder, rows, preprocessing, family)
        drawn = (args.seed, samples_a_step, accelerator.device, args.proportion_empty_prompts)
        return CachedLatents(cache, *drawn, num_workers=args.dataloader_num_workers)
    pictures = make_pictures(
        rows,
        preprocessing,
        args.seed,
        samples_a_step,
        num_workers=args.dataloader_num_workers,
        proportion_empty_prompts=args.proportion_empty_prompts,
    )
    return EncodedLatents(pictures, family, accelerator.device)


def _samples(
    pipeline: DiffusionPipeline, teacher: DiffusionPipeline, loop: DistillationLoop, args: DistillationArguments
) -> Samples:
    prompts = args.validation_prompts
    forbidden = [prompt for prompt in prompts if any(names_concept(prompt, name) for name in args.forbidden_concepts)]
    learned = [prompt for prompt in prompts if prompt not in forbidden]
    settings = GenerationSettings(args.num_inference_steps, height=args.resolution, width=args.resolution)
    return Samples(
        pipeline, loop.weights, forbidden, learned, args.num_validation_images, args.seed, settings, teacher
    )


if __name__ == "__main__":
    main()
