"""Command-line arguments of the erasure scripts."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..arguments import note, parse_dataclass, typed
from ..concepts import CONCEPT_SCHEDULES, PROMPT_ORDERS, joined, names_concept, read_concepts
from ..families import StoredModel
from ..methods import ESDObjective, Objective, SDDObjective
from ..methods.esd import ESD_SAMPLERS
from ..methods.presets import ESD_PRESETS, Preset
from ..methods.sdd import SDD_TARGETS
from ..training.arguments import SamplingArguments, option, required
from .checks import check_run


@typed
@dataclass(kw_only=True)
class ErasureArguments(SamplingArguments):
    """What every erasure method takes."""

    concepts: list[str] = required("What to erase: one or more names, or one .txt file with a concept a line.")
    concept_schedule: str = option(
        "iterative", f"How several concepts take turns: {', '.join(CONCEPT_SCHEDULES)}.", CONCEPT_SCHEDULES
    )
    prompt_order: str = option(
        "paper",
        "paper: draw latents with one concept, train on all joined; repository: the other way round; "
        "matched: one concept for both.",
        PROMPT_ORDERS,
    )
    trajectory_pool: int = option(
        0,
        "Where the frozen model draws the latents (always for --retain_prompts), draw this many trajectories once, "
        "ahead, and take all samples from them; 0, the papers' rule, draws anew for every step.",
    )
    retain_prompts: list[str] = option(
        [], "Prompts whose predictions are kept where the base model has them (names, or one .txt file)."
    )
    retain_unconditional: bool = option(
        False,
        "Also keep the unconditional prediction, on the way to the concepts: guidance multiplies the distance to it.",
    )
    retain_weight: float = option(3.0, "Weight of each of these two retention terms.")
    watch_prompts: list[str] = option(
        ["a cat", "a tree", "a car", "an apple"],
        "Unrelated prompts that are watched, not trained: a warning says when they start to move. Those that name a "
        "concept are left out.",
    )

    # Set where a subclass has them.
    PRESETS: ClassVar[dict[str, Preset]] = {}
    SAVES: ClassVar[tuple[str, ...]] = ("full", "partial", "both", "unet")
    MAY_CHANGE_ON_RESUME: ClassVar[frozenset[str]] = SamplingArguments.MAY_CHANGE_ON_RESUME | {
        "watch_prompts",
        "preset",
    }

    def make_objective(self) -> Objective:
        """The method, with its settings."""
        raise NotImplementedError

    def __post_init__(self):
        self.concepts = read_concepts(self.concepts)
        super().__post_init__()
        if self.retain_prompts:
            self.retain_prompts = read_concepts(self.retain_prompts, "retain_prompts")
        for prompt in self.retain_prompts:
            if (named := self._named_concept(prompt)) is not None:
                raise ValueError(
                    f"retain_prompts '{prompt}': names the concept '{named}'; a concept cannot be erased and retained"
                )
        self._choose_watched()
        self._check_at_least(0, "retain_weight", "trajectory_pool")

    def _named_concept(self, prompt: str) -> str | None:
        """The first concept whose words are in a prompt."""
        return next((concept for concept in self.concepts if names_concept(prompt, concept)), None)

    def _choose_watched(self) -> None:
        """Leaves out prompts that name a concept, and says so if they are not the default."""
        if not self.watch_prompts:
            return
        default = next(item for item in fields(self) if item.name == "watch_prompts").default_factory()
        prompts = read_concepts(self.watch_prompts, "watch_prompts")
        self.watch_prompts = [prompt for prompt in prompts if self._named_concept(prompt) is None]
        if prompts != default:
            for prompt in (prompt for prompt in prompts if prompt not in self.watch_prompts):
                note("watch_prompts '%s': left out, it names the concept '%s'", prompt, self._named_concept(prompt))

    def check_base_model(self) -> nn.Module:
        model = StoredModel(self.pretrained_model_name_or_path, self.resolution, **self.index_arguments)
        check_run(self, model)
        return model.denoiser

    @property
    def may_grow(self) -> bool:
        return super().may_grow and self.concept_schedule != "sequential"

    def pooled_purposes(self) -> set[str]:
        """Whose samples come from a pool: those to `"erase"` where the frozen model draws them, those to `"retain"`
        where there are any.

        Raises:
            `ValueError`: If a pool is asked for and neither can, or it is too small, or the concepts must not mix.
        """
        size, sampler, pooled = self.trajectory_pool, self.make_objective().trajectory_weights, {}
        if size and sampler == "frozen":
            pooled["erase"] = self.concepts
            if self.concept_schedule == "sequential":
                raise ValueError(
                    f"trajectory_pool {size}: takes the concepts in turn, which concept_schedule sequential must not; "
                    "allowed is 0"
                )
        if size and self.retain_prompts and self.retain_weight > 0:
            pooled["retain"] = self.retain_prompts
        if size and not pooled:
            raise ValueError(
                f"trajectory_pool {size}: the latents are the {sampler}'s, which moves, and there are no "
                "retain_prompts, whose latents are the frozen model's; allowed is 0"
            )
        for purpose, prompts in pooled.items():
            if size < len(prompts):
                raise ValueError(f"trajectory_pool {size}: must be at least {len(prompts)}, the prompts to {purpose}")
        return set(pooled)


@typed
@dataclass(kw_only=True)
class SDDArguments(ErasureArguments):
    """Arguments of SDD."""

    ema_decay: float = option(0.999, "m of the average that samples and is published; in [0, 1).")
    sdd_target: str = option(
        "student",
        "Whose prediction is the target: student (the paper) or frozen (the base model's, cannot drift).",
        SDD_TARGETS,
    )
    target_prompt: str = option(
        "", "What the concept becomes: nothing (the paper), or what another prompt says, as in Concept Ablation."
    )
    negative_guidance_scale: float = option(
        0.0,
        "Moves the target away from all concepts joined, by this much of what they say: for models that draw the "
        "concept unasked, too. The paper's is 0.",
    )

    def __post_init__(self):
        super().__post_init__()
        if named := [concept for concept in self.concepts if names_concept(self.target_prompt, concept)]:
            raise ValueError(f"target_prompt '{self.target_prompt}': names {', '.join(named)}, which is to be erased")
        self._check_at_least(0, "negative_guidance_scale")
        if self.negative_guidance_scale and self.concept_schedule == "sequential":
            raise ValueError(
                f"negative_guidance_scale {self.negative_guidance_scale}: moves away from all concepts at once, which "
                "concept_schedule sequential must not know yet; allowed are the other schedules"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}: must be at least 0 and less than 1")
        self.pooled_purposes()

    def make_objective(self) -> SDDObjective:
        return SDDObjective(self.sdd_target, self.target_prompt, self.negative_guidance_scale, joined(self.concepts))


_ESD = ESD_PRESETS["paper"].options


@typed
@dataclass(kw_only=True)
class ESDArguments(ErasureArguments):
    """Arguments of ESD."""

    PRESETS: ClassVar[dict[str, Preset]] = ESD_PRESETS

    preset: str = option(
        "paper",
        f"Published settings that stand for all options not given: "
        f"{'; '.join(f'{name} ({preset.told})' for name, preset in ESD_PRESETS.items())}.",
        ESD_PRESETS,
    )
    prompt_order: str = option(
        "matched",
        "matched: draw latents with one concept, train on the same; paper and repository: as in SDD, where one of the "
        "two is all concepts joined.",
        PROMPT_ORDERS,
    )
    max_train_steps: int = option(_ESD["max_train_steps"], "Optimizer steps.")
    adam_weight_decay: float = option(_ESD["adam_weight_decay"], "AdamW's weight decay.")
    max_grad_norm: float = option(_ESD["max_grad_norm"], "Gradients are clipped to this norm; 0 leaves them.")
    negative_guidance_scale: float | None = option(
        None,
        "eta of the paper, how far beyond nothing the concept is moved. (negative_guidance of the code of 2025 is eta "
        "+ 1, with --erase_from eta.) Default the preset's.",
    )
    erase_from: str | None = option(
        None, "Erase the concepts only from what this prompt says, such as 'a painting'; other prompts are left alone."
    )
    sampling_model: str = option(
        _ESD["sampling_model"], f"Who draws the latents: {', '.join(ESD_SAMPLERS)} (the base model).", ESD_SAMPLERS
    )

    def __post_init__(self):
        super().__post_init__()
        if self.erase_from is not None and not self.erase_from.strip():
            raise ValueError("erase_from: is blank; leave it out, or name a prompt")
        if self.erase_from in self.retain_prompts:
            raise ValueError(f"retain_prompts '{self.erase_from}': is what the concepts are erased from")
        self.watch_prompts = [prompt for prompt in self.watch_prompts if prompt != self.erase_from]
        if self.preset == "esd-2025-xl" and not self.train_method.startswith("xattn") and self.learning_rate == 2e-4:
            raise ValueError(
                f"learning_rate 0.0002: preset esd-2025-xl has it for esd-x only; with train_method "
                f"{self.train_method} the code of 2025 takes 1e-5: give --learning_rate"
            )
        if self.negative_guidance_scale is None:
            preset = self.PRESETS[self.preset]
            scale = preset.erase_from_scale if self.erase_from is not None else None
            self.negative_guidance_scale = preset.options["negative_guidance_scale"] if scale is None else scale
        self._check_at_least(0, "negative_guidance_scale")
        self.pooled_purposes()

    def make_objective(self) -> ESDObjective:
        return ESDObjective(self.negative_guidance_scale, self.erase_from, self.sampling_model)


METHODS: dict[str, type[ErasureArguments]] = {"esd": ESDArguments, "sdd": SDDArguments}
Arguments = TypeVar("Arguments", bound=ErasureArguments)


def parse_arguments(kind: type[Arguments], description: str, argv: list[str] | None = None) -> Arguments:
    """Reads and checks the command line of an erasure script; see [`parse_dataclass`]."""
    return parse_dataclass(
        kind, description, argv, check=ErasureArguments.check_surroundings, presets=preset_options(kind)
    )


def preset_options(kind: type[ErasureArguments]) -> dict[str, dict[str, Any]]:
    """The presets of a method as values in place of the defaults. `__post_init__` chooses the scale itself, since it
    depends on other options."""
    return {
        name: {option: value for option, value in preset.options.items() if option != "negative_guidance_scale"}
        for name, preset in kind.PRESETS.items()
    }
