"""The images and captions of a distillation, as latents and text states."""

from pathlib import Path

from accelerate import Accelerator

from ..families import ModelFamily
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
from .options import DataOptions, DistillationOptions


def open_rows(data: DataOptions, cache_dir: str | None, seed: int) -> CaptionedImages:
    """The images and captions of a run.

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
