"""The options of an erasure: those of every job, of concepts and retention, and the method's own."""

from dataclasses import dataclass, make_dataclass
from functools import cache
from typing import Any, ClassVar

from torch import nn

from ..arguments import group, option, required
from ..command_line import parse_dataclass
from ..concepts import CONCEPT_SCHEDULES, PROMPT_ORDERS, names_concept, read_concepts
from ..families import StoredModel
from ..messages import note
from ..methods import Method, find_method
from ..training.job import JobOptions, TrainingOptions
from ..training.options import SamplingOptions
from .checks import check_run


@dataclass(kw_only=True)
class ConceptOptions:
    """What is erased."""

    concepts: list[str] = required("What to erase: one or more names, or one .txt file with a concept per line.")
    concept_schedule: str = option(
        "iterative", f"How several concepts take turns: {', '.join(CONCEPT_SCHEDULES)}.", CONCEPT_SCHEDULES
    )
    prompt_order: str = option(
        "paper",
        "paper: sample latents with one concept, train on all joined; repository: the other way round; matched: one "
        "concept for both.",
        PROMPT_ORDERS,
    )

    def named_in(self, prompt: str) -> str | None:
        """The first concept whose words are in a prompt."""
        return next((concept for concept in self.concepts if names_concept(prompt, concept)), None)


@dataclass(kw_only=True)
class TrajectoryOptions(SamplingOptions):
    """Noisy latents of erasures, which may be used several times."""

    trajectory_pool: int = option(
        0,
        "Where the frozen model samples the latents (always for --retain_prompts), sample this many trajectories in "
        "advance, once, and take all samples from them; 0, the papers' rule, samples new ones for every step.",
        at_least=0,
    )


@dataclass(kw_only=True)
class RetentionOptions:
    """What stays as it is."""

    retain_prompts: list[str] = option(
        [],
        "Prompts whose predictions stay those of the base model (names, or one .txt file).",
        essential=True,
    )
    retain_unconditional: bool = option(
        False,
        "Also keep the unconditional prediction at the latents of the concepts: guidance multiplies the distance to "
        "it.",
    )
    retain_weight: float = option(3.0, "Weight of each of these two terms of the loss.", at_least=0)
    watch_prompts: list[str] = option(
        ["a cat", "a tree", "a car", "an apple"],
        "Unrelated prompts that are measured, not trained: a warning is printed when their predictions move. Those "
        "that name a concept are left out.",
        may_change=True,
    )

    def resolve(self, concept: ConceptOptions) -> None:
        """Reads the lists, and compares them with the concepts.

        Raises:
            `ValueError`: If a list cannot be read, or a concept is to be erased and retained.
        """
        if self.retain_prompts:
            self.retain_prompts = read_concepts(self.retain_prompts, "retain_prompts")
        for prompt in self.retain_prompts:
            if (named := concept.named_in(prompt)) is not None:
                raise ValueError(
                    f"retain_prompts '{prompt}': names the concept '{named}'; a concept cannot be erased and retained"
                )
        if not self.watch_prompts:
            return
        chosen = self.watch_prompts != RetentionOptions().watch_prompts
        prompts = read_concepts(self.watch_prompts, "watch_prompts")
        self.watch_prompts = [prompt for prompt in prompts if concept.named_in(prompt) is None]
        for prompt in [prompt for prompt in prompts if chosen and prompt not in self.watch_prompts]:
            note("watch_prompts '%s': left out, it names the concept '%s'", prompt, concept.named_in(prompt))

    @property
    def trained_prompts(self) -> list[str]:
        """The prompts that have a term in the loss."""
        return self.retain_prompts if self.retain_weight > 0 else []

    @property
    def keeps_unconditional(self) -> bool:
        return self.retain_weight > 0 and self.retain_unconditional


@dataclass(kw_only=True)
class ErasureOptions(JobOptions):
    """What every erasure takes."""

    concept: ConceptOptions = group("concepts")
    retention: RetentionOptions = group("retention")
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

    sampling: TrajectoryOptions = group("sampling of latents")

    @property
    def ema_decay(self) -> float | None:
        return self.method.ema_decay

    @property
    def may_grow(self) -> bool:
        return super().may_grow and self.concept.concept_schedule != "sequential"

    def resolve(self) -> None:
        super().resolve()
        self.pooled_terms()

    def pooled_terms(self) -> set[str]:
        """The terms of the loss whose samples come from a pool: `"erase"` where the frozen model samples them,
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
                    f"trajectory_pool {size}: takes the concepts in turn, which concept_schedule sequential must not; "
                    "allowed is 0"
                )
        if size and self.retention.trained_prompts:
            pooled["retain"] = self.retention.retain_prompts
        if size and not pooled:
            raise ValueError(
                f"trajectory_pool {size}: the latents are the {weights}'s, which moves, and there are no "
                "retain_prompts, whose latents are the frozen model's; allowed is 0"
            )
        for term, prompts in pooled.items():
            if size < len(prompts):
                raise ValueError(f"trajectory_pool {size}: must be at least {len(prompts)}, the prompts to {term}")
        return set(pooled)


@cache
def erasure_options(method: type[Method]) -> type[ErasureOptions]:
    """The dataclass of all options of an erasure by a method."""
    base = TrainedErasureOptions if method.trains else ErasureOptions
    # What depends on another option of the method is resolved by the method itself.
    presets = {
        name: {key: value for key, value in preset.options.items() if key != "negative_guidance_scale"}
        for name, preset in method.presets.items()
    }
    return make_dataclass(
        f"{method.__name__}Options",
        [("method", method, group(f"method {method.name}"))],
        bases=(base,),
        kw_only=True,
        namespace={"DEFAULTS": {**base.DEFAULTS, **method.defaults}, "PRESETS": presets},
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
    description = f"{method.summary}\n\n{method.title} ({method.authors}, arXiv {method.paper})"
    fixed = {"method": method.name}
    return parse_dataclass(kind, description, argv, prog, check=kind.check_surroundings, fixed=fixed)
