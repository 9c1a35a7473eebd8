"""Command-line arguments of the erasure scripts: defined once, typed, checked before any model is loaded."""

import math
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffusers.optimization import SchedulerType
from torch import nn

from ..arguments import check_output_dir, parse_dataclass
from ..backbones import check_model
from ..concepts import CONCEPT_SCHEDULES, PROMPT_ORDERS, joined, names_concept, read_concepts
from ..hub import check_model_id, check_push, default_model_id
from ..weights import TRAIN_METHODS, resolve_train_method, select_parameters
from .checkpoints import checkpoint_step, list_checkpoints
from .loss_space import LOSS_SPACES
from .objectives import ESDObjective, Objective, SDDObjective
from .objectives.esd import ESD_SAMPLERS
from .objectives.sdd import SDD_TARGETS
from .presets import ESD_PRESETS, Preset


SAVES = ("full", "partial", "both", "unet")
LORA_SAVES = ("lora", "full", "both", "unet")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("tensorboard", "wandb", "none")
# All of diffusers' but piecewise_constant, whose rules have no option.
LR_SCHEDULERS = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)


def _option(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _required(help: str):
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class ErasureArguments:
    """What every erasure method takes. Names are those of diffusers' training examples where they have one."""

    pretrained_model_name_or_path: str = _required("Hub id or folder of a diffusers pipeline.")
    concepts: list[str] = _required("What to erase: one or more names, or one .txt file with a concept a line.")
    output_dir: str | None = _required("Where the erased pipeline, erasure.json and checkpoints go.")
    revision: str | None = _option(None, "Revision of the model on the Hub.")
    variant: str | None = _option(None, "Variant of the weight files, such as fp16.")
    cache_dir: str | None = _option(None, "Where downloads from the Hub are kept.")
    resolution: int | None = _option(
        None,
        "Height and width, in pixels, of the pictures whose latents are trained; the model's own if left out. A "
        "multiple of what the autoencoder divides it by (8 for Stable Diffusion).",
    )
    train_method: str = _option(
        "xattn", f"Which weights train: {'; '.join(f'{n} ({m.description})' for n, m in TRAIN_METHODS.items())}."
    )
    rank: int | None = _option(
        None,
        "Train a LoRA of this rank instead of the weights themselves: adapters on the linear and convolution layers "
        "that train_method selects.",
    )
    lora_alpha: float | None = _option(
        None,
        "The LoRA counts alpha / rank times. Default rank, which is what programs assume that do not read diffusers' "
        "metadata.",
    )
    concept_schedule: str = _option("iterative", f"How several concepts take turns: {', '.join(CONCEPT_SCHEDULES)}.")
    prompt_order: str = _option(
        "paper",
        "paper: draw latents with one concept, train on all joined; repository: the other way round; "
        "matched: one concept for both.",
    )
    num_inference_steps: int = _option(50, "Steps of the whole sampling schedule; a latent stops at one of them.")
    sampling_fraction: float = _option(
        1.0,
        "Latents stop within this first part of the schedule, in (0, 1]. The paper's is 1; the high "
        "noise levels, where it is decided what a picture shows, come first.",
    )
    sampling_guidance_scale: float = _option(3.0, "Classifier-free guidance while latents are drawn.")
    latents_per_trajectory: int = _option(
        1,
        "Latents that one run of the sampler gives, at as many stops, for as many successive optimizer steps; they "
        "are drawn at the first of these, and grow old. The papers' is 1.",
    )
    trajectory_pool: int = _option(
        0,
        "Where the frozen model draws the latents (always for --retain_prompts), draw this many trajectories once, "
        "ahead, and take all samples from them; 0, the papers' rule, draws anew for every step.",
    )
    loss_space: str = _option(
        "prediction",
        "In what errors are measured: prediction (what the model predicts, the papers) or velocity (high noise levels "
        "count more).",
    )
    retain_prompts: list[str] = _option(
        [], "Prompts whose predictions are kept where the base model has them (names, or one .txt file)."
    )
    retain_unconditional: bool = _option(
        False,
        "Also keep the unconditional prediction, on the way to the concepts: guidance multiplies the distance to it.",
    )
    retain_weight: float = _option(1.0, "Weight of each of these two retention terms.")
    watch_prompts: list[str] = _option(
        ["a cat", "a tree", "a car", "an apple"],
        "Unrelated prompts that are watched, not trained: a warning says when they start to move. Those that name a "
        "concept are left out.",
    )
    max_train_steps: int = _option(1500, "Optimizer steps.")
    train_batch_size: int = _option(1, "Samples a process and step.")
    gradient_accumulation_steps: int = _option(1, "Batches an optimizer step.")
    gradient_checkpointing: bool = _option(False, "Compute activations twice instead of keeping them: less memory.")
    mixed_precision: str | None = _option(
        None,
        f"Of forwards and gradients; trained weights stay float32. {', '.join(MIXED_PRECISIONS)}; default what "
        "`accelerate launch` says.",
    )
    allow_tf32: bool = _option(False, "TensorFloat-32 matrix products on GPUs that have them: faster, less exact.")
    learning_rate: float = _option(1e-5, "Peak learning rate of AdamW.")
    scale_lr: bool = _option(False, "Multiply the learning rate by processes, accumulation and batch size.")
    lr_scheduler: str = _option("constant", f"One of {', '.join(LR_SCHEDULERS)}.")
    lr_warmup_steps: int = _option(0, "Warm-up steps of the learning rate.")
    use_8bit_adam: bool = _option(False, "AdamW with 8-bit states, of bitsandbytes.")
    adam_beta1: float = _option(0.9, "AdamW's beta 1.")
    adam_beta2: float = _option(0.999, "AdamW's beta 2.")
    adam_weight_decay: float = _option(1e-4, "AdamW's weight decay.")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0 leaves them.")
    seed: int = _option(0, "Every draw of the run follows from it.")
    save: str | None = _option(
        None,
        "full: a stock pipeline folder; unet: its UNet only; partial: the erased weights only; both: full and "
        "partial. With --rank: lora, a file for load_lora_weights; full or unet, with the LoRA fused in; both: full "
        "and lora. The default is full, with --rank lora.",
    )
    checkpointing_steps: int = _option(500, "Steps between checkpoints; 0 saves none but when the run is stopped.")
    checkpoints_total_limit: int | None = _option(2, "Keep only this many checkpoints.")
    resume_from_checkpoint: str | None = _option(None, "A checkpoint folder, or latest.")
    validation_prompts: list[str] = _option(
        [], "Prompts drawn before and after, side by side, into the folder validation in the output folder."
    )
    num_validation_images: int = _option(1, "Images of each validation prompt, and of each prompt on the Hub's card.")
    validation_steps: int = _option(100, "Steps between two such pictures; the last step always has one.")
    report_to: str = _option(
        "none", f"Where to follow the run, beside log.jsonl in the output folder: {', '.join(TRACKERS)}."
    )
    logging_dir: str = _option("logs", "Folder of the tracker's files, in the output folder.")
    push_to_hub: bool = _option(False, "Publish the finished result on the Hugging Face Hub, with a model card.")
    hub_model_id: str | None = _option(
        None, "Repository on the Hub: user/name, or a name in your own account; default the output folder's name."
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Default HF_TOKEN, or the one of `hf auth login`. It is written nowhere."},
    )
    hub_private: bool = _option(False, "Make the repository private, if it is a new one.")
    dry_run: bool = _option(False, "Tell what would be done: weights, forwards, memory. Nothing is written.")

    # Set where a subclass has them.
    PRESETS: ClassVar[dict[str, Preset]] = {}
    ema_decay: ClassVar[float | None] = None

    def make_objective(self) -> Objective:
        """The method, with its settings."""
        raise NotImplementedError

    def __post_init__(self):
        """Checks every value that can be checked without a model.

        Raises:
            `ValueError`: One line with the name, the value and what is allowed.
        """
        self.concepts = read_concepts(self.concepts)
        self.retain_prompts = read_concepts(self.retain_prompts) if self.retain_prompts else []
        self.watch_prompts = [
            prompt
            for prompt in (read_concepts(self.watch_prompts) if self.watch_prompts else [])
            if not any(names_concept(prompt, concept) for concept in self.concepts)
        ]
        self.validation_prompts = read_concepts(self.validation_prompts) if self.validation_prompts else []
        if self.validation_prompts and self.output_dir is None:
            raise ValueError("validation_prompts: needs an output_dir, where the pictures go")
        self.train_method = resolve_train_method(self.train_method)
        if both := sorted(set(self.concepts) & set(self.retain_prompts)):
            raise ValueError(f"retain_prompts {both}: a concept cannot be erased and retained")
        self._resolve_lora()
        self._check_choices(
            concept_schedule=CONCEPT_SCHEDULES,
            prompt_order=PROMPT_ORDERS,
            lr_scheduler=LR_SCHEDULERS,
            loss_space=LOSS_SPACES,
            report_to=TRACKERS,
            mixed_precision=(*MIXED_PRECISIONS, None),
        )
        self._check_at_least(
            0,
            "lr_warmup_steps",
            "checkpointing_steps",
            "retain_weight",
            "adam_weight_decay",
            "max_grad_norm",
            "trajectory_pool",
            "seed",
        )
        self._check_at_least(
            1,
            "resolution",
            "max_train_steps",
            "num_inference_steps",
            "latents_per_trajectory",
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_validation_images",
            "validation_steps",
            "checkpoints_total_limit",
        )
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{item.name} {value}: must be a finite number")
        if not 0 < self.sampling_fraction <= 1:
            raise ValueError(f"sampling_fraction {self.sampling_fraction}: must be greater than 0 and at most 1")
        stops = max(1, round(self.sampling_fraction * self.num_inference_steps))
        if self.latents_per_trajectory > stops:
            raise ValueError(
                f"latents_per_trajectory {self.latents_per_trajectory}: must be at most {stops}, the stops of a "
                "trajectory (num_inference_steps * sampling_fraction)"
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed {self.seed}: must be less than 2**32")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(f"lr_warmup_steps {self.lr_warmup_steps}: needs --lr_scheduler constant_with_warmup")
        for name in ("learning_rate", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be greater than 0")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 0 and less than 1")

        self._check_hub()
        for option, package in self._needed_packages().items():
            if find_spec(package) is None:
                raise ValueError(f"{option}: needs the package {package}, which is not installed")

    def _needed_packages(self) -> dict[str, str]:
        needed = {"use_8bit_adam": "bitsandbytes"} if self.use_8bit_adam else {}
        return needed if self.report_to == "none" else {**needed, f"report_to {self.report_to}": self.report_to}

    def _check_hub(self) -> None:
        if self.push_to_hub:
            if self.output_dir is None:
                raise ValueError("push_to_hub: needs an output_dir")
            self.hub_model_id = self.hub_model_id or default_model_id(self.output_dir)
            check_model_id(self.hub_model_id)
        elif useless := [name for name in ("hub_model_id", "hub_token", "hub_private") if getattr(self, name)]:
            raise ValueError(f"{', '.join(useless)}: without --push_to_hub nothing is published; give it, too")

    def _resolve_lora(self) -> None:
        self._check_at_least(1, "rank")
        if self.rank is None and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha {self.lora_alpha}: needs --rank")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha {self.lora_alpha}: must be greater than 0")
        if self.rank is not None and self.lora_alpha is None:
            self.lora_alpha = float(self.rank)
        if self.save is None:
            self.save = "full" if self.rank is None else "lora"
        allowed = SAVES if self.rank is None else LORA_SAVES
        if self.save not in allowed:
            given = "without" if self.rank is None else "with"
            raise ValueError(f"save '{self.save}': allowed {given} --rank are {', '.join(allowed)}")

    def _check_choices(self, **choices) -> None:
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                told = ", ".join(value for value in allowed if value is not None)
                raise ValueError(f"{name} '{getattr(self, name)}': unknown; allowed are {told}")

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} {value}: must be at least {least}")

    def pooled_purposes(self) -> set[str]:
        """Whose samples come from a pool: those to `"erase"` where the frozen model draws them, those to `"retain"`
        where there are any.

        Raises:
            `ValueError`: If a pool is asked for and neither can, or it is too small, or the concepts must not mix.
        """
        size, sampler, pooled = self.trajectory_pool, self.make_objective().sampler, {}
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

    @property
    def recorded(self) -> dict:
        """The arguments as records of the run hold them: without what is secret, or does not touch the result."""
        unrecorded = {"cache_dir", "push_to_hub", *(name for name in vars(self) if name.startswith("hub_"))}
        return {name: value for name, value in asdict(self).items() if name not in unrecorded}

    @property
    def hub_arguments(self) -> dict:
        """What `from_pretrained` takes beside the name."""
        chosen = {"revision": self.revision, "variant": self.variant, "cache_dir": self.cache_dir}
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def index_arguments(self) -> dict:
        """The same for the index alone."""
        return {name: value for name, value in self.hub_arguments.items() if name != "variant"}

    @property
    def tracker_dir(self) -> str:
        return str(Path(self.output_dir) / self.logging_dir)

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to continue from, if one was asked for.

        Raises:
            `ValueError`: If it does not exist.
        """
        if self.resume_from_checkpoint is None:
            return None
        if self.resume_from_checkpoint == "latest":
            if found := list_checkpoints(Path(self.output_dir)):
                return found[-1]
            raise ValueError(f"resume_from_checkpoint latest: no checkpoint in {self.output_dir}")
        path = Path(self.resume_from_checkpoint)
        try:
            checkpoint_step(path)
        except ValueError:
            raise ValueError(f"resume_from_checkpoint {path}: not a folder named checkpoint-<step>") from None
        if not path.is_dir():
            raise ValueError(f"resume_from_checkpoint {path}: no such folder")
        return path

    def check_surroundings(self) -> None:
        """Checks what lies outside the arguments: the model's configs, the checkpoint, and the output folder, last,
        which is created.

        Raises:
            `ValueError`: One line that says what is wrong.
        """
        if self.push_to_hub:
            check_push(self.hub_model_id, self.hub_token)
        self.check_base_model()
        if not self.dry_run:
            self.check_output()

    def check_base_model(self) -> nn.Module:
        """The part of [`~ErasureArguments.check_surroundings`] about the model; returns its denoiser's structure."""
        denoiser = check_model(self.pretrained_model_name_or_path, self.resolution, **self.index_arguments)
        select_parameters(denoiser, self.train_method)
        return denoiser

    def check_output(self) -> None:
        """The part of [`~ErasureArguments.check_surroundings`] about the output folder and what it holds."""
        if Path(self.output_dir).resolve() == Path(self.pretrained_model_name_or_path).resolve():
            raise ValueError(f"output_dir {self.output_dir}: is the base model's own folder; give another")
        checkpoint = self.find_checkpoint()
        if checkpoint is None and list_checkpoints(Path(self.output_dir)):
            raise ValueError(
                f"output_dir {self.output_dir}: holds checkpoints of an earlier run; "
                "give --resume_from_checkpoint latest, or another folder"
            )
        if checkpoint is not None and checkpoint_step(checkpoint) > self.max_train_steps:
            raise ValueError(f"max_train_steps {self.max_train_steps}: {checkpoint} is further already")
        check_output_dir(self.output_dir)


@dataclass(kw_only=True)
class SDDArguments(ErasureArguments):
    """Arguments of SDD."""

    ema_decay: float = _option(0.999, "m of the average that samples and is published; in [0, 1).")
    sdd_target: str = _option(
        "student", "Whose prediction is the target: student (the paper) or frozen (the base model's, cannot drift)."
    )
    target_prompt: str = _option(
        "", "What the concept becomes: nothing (the paper), or what another prompt says, as in Concept Ablation."
    )
    negative_guidance_scale: float = _option(
        0.0,
        "Moves the target away from all concepts joined, by this much of what they say: for models that draw the "
        "concept unasked, too. The paper's is 0.",
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_choices(sdd_target=SDD_TARGETS)
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


@dataclass(kw_only=True)
class ESDArguments(ErasureArguments):
    """Arguments of ESD."""

    PRESETS: ClassVar[dict[str, Preset]] = ESD_PRESETS

    preset: str = _option(
        "paper",
        f"Published settings that stand for all options not given: "
        f"{'; '.join(f'{name} ({preset.told})' for name, preset in ESD_PRESETS.items())}.",
    )
    prompt_order: str = _option(
        "matched",
        "matched: draw latents with one concept, train on the same; paper and repository: as in SDD, where one of the "
        "two is all concepts joined.",
    )
    max_train_steps: int = _option(_ESD["max_train_steps"], "Optimizer steps.")
    adam_weight_decay: float = _option(_ESD["adam_weight_decay"], "AdamW's weight decay.")
    max_grad_norm: float = _option(_ESD["max_grad_norm"], "Gradients are clipped to this norm; 0 leaves them.")
    negative_guidance_scale: float | None = _option(
        None,
        "eta of the paper, how far beyond nothing the concept is moved. (negative_guidance of the code of 2025 is eta "
        "+ 1, with --erase_from eta.) Default the preset's.",
    )
    erase_from: str | None = _option(
        None, "Erase the concepts only from what this prompt says, such as 'a painting'; other prompts are left alone."
    )
    sampling_model: str = _option(
        _ESD["sampling_model"], f"Who draws the latents: {', '.join(ESD_SAMPLERS)} (the base model)."
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_choices(preset=self.PRESETS, sampling_model=ESD_SAMPLERS)
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
