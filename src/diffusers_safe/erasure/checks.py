"""What of a run and its model can be known before weights are read, moved or changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..concepts import ConceptSchedule
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.trajectories import Trajectories
from ..families import ModelFamily, StoredModel
from ..weights.lora import layers_to_adapt
from ..weights.trained import check_plain, select_parameters


if TYPE_CHECKING:
    from .arguments import ErasureArguments


def check_run(args: ErasureArguments, model: ModelFamily | StoredModel) -> None:
    """Looks at a model, loaded or not, for all that a run will ask of it.

    Raises:
        `ValueError`: If the train method means nothing in its denoiser, the denoiser has adapters, its scheduler
            cannot do these steps or losses, or a prompt is longer than its text encoders take.
    """
    check_plain(model.denoiser)
    names = select_parameters(model.denoiser, args.train_method)
    if args.rank is not None:
        layers_to_adapt(model.denoiser, names, args.rank)
    scheduled = (model.make_scheduler, model.latent_shape, args.num_inference_steps, args.sampling_guidance_scale)
    Trajectories(*scheduled).stop_choices(args.sampling_fraction, args.latents_per_trajectory)
    LossWeighting(args.loss_space, model.make_scheduler())
    try:
        model.check_prompts(encoded_prompts(args))
    except ValueError as error:
        joined = "concepts are not joined with --prompt_order matched and no --negative_guidance_scale"
        raise ValueError(f"{error}; {joined}") from None
    model.warn_of_unknown_words(args.concepts)


def encoded_prompts(args: ErasureArguments) -> list[str]:
    """Every prompt that a run encodes; what is only drawn, for people to look at, may be cut."""
    schedule = ConceptSchedule(args.concepts, args.concept_schedule, args.prompt_order, num_samples=1)
    return [
        *schedule.all_prompts(),
        *args.make_objective().prompts,
        *args.retain_prompts,
        *args.watch_prompts,
    ]
