"""An erasure as a job: all of its options, and the checks of a model before weights are read, moved or changed."""

import os
from dataclasses import dataclass, make_dataclass
from functools import cache
from typing import Any, ClassVar

from torch import nn

from ..arguments import group
from ..command_line import parse_dataclass
from ..concepts import ConceptSchedule, read_concepts
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.trajectories import Trajectories
from ..embedded import locate_model
from ..families import TEXT_ENCODERS, ModelFamily, StoredModel, TextEncoders, denoiser_names
from ..formats import fetch, read_erased_weights
from ..messages import num_launched
from ..methods import Method, find_method, method_label
from ..training.job import JobOptions, TrainingOptions
from ..weights.lora import layers_to_adapt
from ..weights.trained import check_plain, select_parameters
from .options import (
    ConceptOptions,
    RetainedOptions,
    RetentionOptions,
    TrainedConceptOptions,
    TrajectoryOptions,
)


@dataclass(kw_only=True)
class ErasureOptions(JobOptions):
    """What every erasure takes."""

    concept: ConceptOptions = group("concepts")
    retention: RetainedOptions = group("retention")
    method: Method = group("method")

    SAVES: ClassVar[tuple[str, ...]] = ("full", "partial", "both")

    def resolve(self) -> None:
        self.concept.concepts = read_concepts(self.concept.concepts)
        super().resolve()
        self.retention.resolve(self.concept)
        self.method.check(self)

    def check_base_model(self) -> nn.Module:
        model = StoredModel(
            self.model.pretrained_model_name_or_path, self.model.resolution, **self.model.index_arguments
        )
        check_run(self, model)
        return model.denoiser


@dataclass(kw_only=True)
class TrainedErasureOptions(ErasureOptions, TrainingOptions):
    """What an erasure by a gradient method takes."""

    concept: TrainedConceptOptions = group("concepts")
    retention: RetentionOptions = group("retention")
    sampling: TrajectoryOptions = group("sampling of latents")

    @property
    def ema_decay(self) -> float | None:
        return self.method.ema_decay

    @property
    def saves_denoiser(self) -> bool:
        return self.weights.train_method != TEXT_ENCODERS

    @property
    def allowed_saves(self) -> tuple[str, ...]:
        return super().allowed_saves if self.saves_denoiser else ("full",)

    @property
    def may_grow(self) -> bool:
        concept = self.concept
        return super().may_grow and concept.concept_schedule != "sequential" and concept.target is None

    @property
    def sources(self) -> dict[str, str | None]:
        return {**super().sources, "start_from": self.concept.start_from}

    def resolve(self) -> None:
        super().resolve()
        self.pooled_terms()
        if (start := self.concept.start_from) is not None and (self.is_lora or not self.saves_denoiser):
            given = "rank" if self.is_lora else f"train_method {TEXT_ENCODERS}"
            raise ValueError(
                f"start_from '{start}': not with {given}; only whole weights of the denoiser can start so"
            )

    def check_base_model(self) -> nn.Module:
        if (start := self.concept.start_from) is not None:
            try:
                place = fetch(start, only_records=True)
                if os.path.exists(locate_model(start)):  # on the Hub there are records alone so far
                    read_erased_weights(place)
            except ValueError as error:
                raise ValueError(f"start_from {error}") from None
        return super().check_base_model()

    def pooled_terms(self) -> set[str]:
        """The loss terms that use the trajectory pool: `"erase"` where the frozen model samples them,
        `"retain"` where there are retained prompts.

        Raises:
            `ValueError`: If a pool is asked for and neither can have one, it is too small, or concepts must not mix.
        """
        size, pooled = self.sampling.trajectory_pool, {}
        weights = self.method.objective(self.concept.concepts).trajectory_weights
        if size and weights == "frozen":
            pooled["erase"] = self.concept.concepts
            if self.concept.concept_schedule == "sequential":
                raise ValueError(
                    f"trajectory_pool {size}: alternates between the concepts, which concept_schedule sequential does "
                    "not allow; allowed is 0"
                )
        if size and self.retention.trained_prompts:
            pooled["retain"] = self.retention.retain_prompts
        if size and not pooled:
            raise ValueError(
                f"trajectory_pool {size}: works only where the frozen base model samples the latents; here the "
                f"{weights} weights sample them, and there are no retain_prompts; allowed is 0"
            )
        for term, prompts in pooled.items():
            if size < len(prompts):
                raise ValueError(
                    f"trajectory_pool {size}: must be at least {len(prompts)}, the number of prompts to {term}"
                )
        return set(pooled)


@cache
def erasure_options(method: type[Method]) -> type[ErasureOptions]:
    """The dataclass of all options of an erasure by a method."""
    base = TrainedErasureOptions if method.trains else ErasureOptions
    return make_dataclass(
        f"{method.__name__}Options",
        [("method", method, group(f"{method_label(method.name)}: {method.title}", first=True))],
        bases=(base,),
        kw_only=True,
        namespace={"DEFAULTS": {**base.DEFAULTS, **method.defaults}, "PRESETS": method.preset_values()},
    )


def make_options(method: str, **values: Any) -> ErasureOptions:
    """The options of an erasure, checked against each other, lists in files read.

    Args:
        method (`str`): A name of `METHODS`.
        values: By the names of the command line.

    Raises:
        `ValueError`: If the method or a name is unknown, or a value does not fit.
    """
    options = erasure_options(find_method(method)).of(**values)
    options.resolve()
    return options


def parse_options(name: str, argv: list[str] | None = None, prog: str | None = None) -> ErasureOptions:
    """Reads and checks the command line of a method; see [`parse_dataclass`]."""
    method = find_method(name)
    kind = erasure_options(method)
    description = f"{method.summary}\n\n{method.title} ({method.get_source()})"
    fixed = {"method": method.name}
    return parse_dataclass(kind, description, argv, prog, check=kind.check_surroundings, fixed=fixed)


def check_run(options: ErasureOptions, model: ModelFamily | StoredModel) -> None:
    """Checks a model, loaded or not, for all that a run will ask of it.

    Raises:
        `ValueError`: If the train method selects nothing in its denoiser, the denoiser has adapters, its scheduler
            does not allow these steps or losses, or a prompt is longer than its text encoders take.
    """
    check_plain(model.denoiser)
    if (save := options.output.save) in denoiser_names() and save != model.denoiser_name:
        raise ValueError(f"save '{save}': this model's denoiser is its {model.denoiser_name}; give that name")
    options.method.edited(model.denoiser)
    if options.method.trains:
        _check_training(options, model)
    try:
        model.check_prompts(encoded_prompts(options))
    except ValueError as error:
        if len(options.concept.concepts) == 1 or not options.method.trains:
            raise
        joined = "concepts are not joined with --prompt_order matched and no --negative_guidance_scale"
        raise ValueError(f"{error}; {joined}") from None
    model.warn_of_unknown_words(options.concept.concepts)


def trained_module(model: ModelFamily | StoredModel, train_method: str) -> nn.Module:
    """What a train method trains: the denoiser, or the text encoders; of a model on disk the structure only."""
    if train_method != TEXT_ENCODERS:
        return model.denoiser
    if isinstance(model, ModelFamily):
        return TextEncoders.of(model)
    return TextEncoders.skeleton(model.family, model.config)


def _check_training(options: ErasureOptions, model: ModelFamily | StoredModel) -> None:
    weights, sampling = options.weights, options.sampling
    if weights.train_method == TEXT_ENCODERS and (count := num_launched()) > 1:
        raise ValueError(f"train_method {TEXT_ENCODERS}: trains in one process, not in {count}")
    names = select_parameters(trained_module(model, weights.train_method), weights.train_method)
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
    others = [*options.method.prompts(concept.concepts), *kept]
    if not options.method.trains:
        return [*concept.concepts, *others]
    schedule = ConceptSchedule(concept.concepts, concept.concept_schedule, concept.prompt_order, num_samples=1)
    return [*schedule.all_prompts(), *others]
