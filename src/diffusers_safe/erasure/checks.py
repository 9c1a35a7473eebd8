"""What can be checked of a run and its model before weights are read, moved or changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..concepts import ConceptSchedule
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.trajectories import Trajectories
from ..families import ModelFamily, StoredModel, denoiser_names
from ..weights.lora import layers_to_adapt
from ..weights.trained import check_plain, select_parameters


if TYPE_CHECKING:
    from .options import ErasureOptions


def check_run(options: ErasureOptions, model: ModelFamily | StoredModel) -> None:
    """Checks a model, loaded or not, for all that a run will ask of it.

    Raises:
        `ValueError`: If the train method selects nothing in its denoiser, the denoiser has adapters, its scheduler
            does not allow these steps or losses, or a prompt is longer than its text encoders take.
    """
    check_plain(model.denoiser)
    if (save := options.output.save) in denoiser_names() and save != model.denoiser_name:
        raise ValueError(f"save '{save}': this model's denoiser is its {model.denoiser_name}; give that name")
    if options.method.trains:
        _check_training(options, model)
    try:
        model.check_prompts(encoded_prompts(options))
    except ValueError as error:
        joined = "concepts are not joined with --prompt_order matched and no --negative_guidance_scale"
        raise ValueError(f"{error}; {joined}") from None
    model.warn_of_unknown_words(options.concept.concepts)


def _check_training(options: ErasureOptions, model: ModelFamily | StoredModel) -> None:
    weights, sampling = options.weights, options.sampling
    names = select_parameters(model.denoiser, weights.train_method)
    if weights.rank is not None:
        layers_to_adapt(model.denoiser, names, weights.rank)
    scheduled = (model.make_scheduler, model.latent_shape, sampling.num_inference_steps)
    trajectories = Trajectories(*scheduled, sampling.sampling_guidance_scale)
    trajectories.stop_choices(sampling.sampling_fraction, sampling.latents_per_trajectory)
    LossWeighting(sampling.loss_space, model.make_scheduler())


def encoded_prompts(options: ErasureOptions) -> list[str]:
    """Every prompt that a run encodes; validation prompts may be truncated."""
    concept, retention = options.concept, options.retention
    kept = [*retention.retain_prompts, *retention.watch_prompts]
    if not options.method.trains:
        return [*concept.concepts, *kept]
    schedule = ConceptSchedule(concept.concepts, concept.concept_schedule, concept.prompt_order, num_samples=1)
    return [*schedule.all_prompts(), *options.method.objective(concept.concepts).prompts, *kept]
