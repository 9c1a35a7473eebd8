"""The options that an erasure has in addition to those of every job and of its method."""

from dataclasses import dataclass

from ..arguments import option, required
from ..concepts import CONCEPT_SCHEDULES, PROMPT_ORDERS, names_concept, read_concepts
from ..messages import note
from ..training.options import SamplingOptions


@dataclass(kw_only=True)
class ConceptOptions:
    """What is erased."""

    concepts: list[str] = required("What to erase: one or more names, or .txt files with one per line.")
    target: float | None = option(
        None,
        "Stop as soon as no more than this share of the concepts' effect on the prediction is left, such as 0.01. A "
        "training is measured 20 times in --max_train_steps, which are the most steps then. The edit of a closed form "
        "is scaled, to at most twice its strength.",
        at_least=0,
        below=1,
        essential=True,
    )

    def named_in(self, prompt: str) -> str | None:
        """The first concept whose words are in a prompt."""
        return next((concept for concept in self.concepts if names_concept(prompt, concept)), None)


@dataclass(kw_only=True)
class TrainedConceptOptions(ConceptOptions):
    """What is erased, and in which order several concepts are trained."""

    concept_schedule: str = option(
        "iterative", f"How several concepts take turns: {', '.join(CONCEPT_SCHEDULES)}.", CONCEPT_SCHEDULES
    )
    prompt_order: str = option(
        "paper",
        "paper: sample latents with one concept, train on all joined; repository: sample with all joined, train on "
        "one; matched: one concept for both.",
        PROMPT_ORDERS,
    )
    start_from: str | None = option(
        None,
        "Begin with the weights of this erased model instead of the base model's: a folder or file with the same base "
        "model, such as the result of a closed form. What is compared with stays the base model.",
    )


@dataclass(kw_only=True)
class TrajectoryOptions(SamplingOptions):
    """Noisy latents of erasures, which may be used several times."""

    trajectory_pool: int = option(
        0,
        "Sample this many trajectories once before training and reuse them. Applies to latents that the base model "
        "samples: those of --retain_prompts, and the concepts' where the method samples with the base model. 0: new "
        "trajectories at every step, as in the papers.",
        at_least=0,
    )


@dataclass(kw_only=True)
class RetainedOptions:
    """What stays as it is, and what is measured."""

    retain_prompts: list[str] = option(
        [],
        "Prompts whose predictions should stay as they are: one or more, or .txt files with one per line.",
        essential=True,
    )
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
        chosen = self.watch_prompts != RetainedOptions().watch_prompts
        prompts = read_concepts(self.watch_prompts, "watch_prompts")
        self.watch_prompts = [prompt for prompt in prompts if concept.named_in(prompt) is None]
        for prompt in [prompt for prompt in prompts if chosen and prompt not in self.watch_prompts]:
            note("watch_prompts '%s': left out, it names the concept '%s'", prompt, concept.named_in(prompt))


@dataclass(kw_only=True)
class RetentionOptions(RetainedOptions):
    """What a training keeps as it is."""

    retain_unconditional: bool = option(
        False,
        "Also keep the unconditional prediction at the latents of the concepts: classifier-free guidance amplifies "
        "any change of it.",
    )
    retain_weight: float = option(
        3.0, "Weight of the losses of --retain_prompts and --retain_unconditional.", at_least=0
    )

    @property
    def trained_prompts(self) -> list[str]:
        """The prompts that have a term in the loss."""
        return self.retain_prompts if self.retain_weight > 0 else []

    @property
    def keeps_unconditional(self) -> bool:
        return self.retain_weight > 0 and self.retain_unconditional
