"""Command-line arguments of every training script: defined once, typed, checked before any model is loaded."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from diffusers.optimization import SchedulerType
from torch import nn

from ..arguments import typed
from ..concepts import read_concepts
from ..diffusion.loss_weighting import LOSS_WEIGHTINGS
from ..embedded import locate_model
from ..families import check_files
from ..formats import result_names
from ..hub import check_model_id, check_push, default_model_id
from ..output_folders import (
    OVERWRITE_HELP,
    RESULT,
    OutputFolderError,
    check_apart,
    check_claim,
    check_output_dir,
    claimed,
)
from ..provenance import load_record
from ..weights.trained import TRAIN_METHODS, resolve_train_method
from .checkpoints import check_same_run, checkpoint_step, list_checkpoints


LOG_NAME, VALIDATION = "log.jsonl", "validation"  # in the output folder
MIXED_PRECISIONS = ("no", "fp16", "bf16")
MAX_SAMPLES = 10**11  # of a run: a hundred times what the largest models were trained on
TRACKERS = ("tensorboard", "wandb", "none")
# All of diffusers' but piecewise_constant, whose rules have no option.
LR_SCHEDULERS = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)


def option(default, help: str, choices: Iterable[str] | None = None):
    """A field of a dataclass of arguments, with the line that `--help` shows, and the values that are allowed."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str):
    """An [`option`] without a default."""
    return field(metadata={"help": help})


@typed
@dataclass(kw_only=True)
class TrainingArguments:
    """What every training takes. Names are those of diffusers' training examples where they have one."""

    pretrained_model_name_or_path: str = required("Hub id or folder of a diffusers pipeline.")
    output_dir: str | None = required("Where the erased pipeline, erasure.json and checkpoints go.")
    revision: str | None = option(None, "Revision of the model on the Hub.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    cache_dir: str | None = option(None, "Where downloads from the Hub are kept.")
    resolution: int | None = option(
        None,
        "Height and width, in pixels, of the pictures whose latents are trained; the model's own if left out. A "
        "multiple of what the autoencoder divides it by (8 for Stable Diffusion).",
    )
    train_method: str = option(
        "xattn", f"Which weights train: {'; '.join(f'{n} ({m.description})' for n, m in TRAIN_METHODS.items())}."
    )
    rank: int | None = option(
        None,
        "Train a LoRA of this rank instead of the weights themselves: adapters on the linear and convolution layers "
        "that train_method selects.",
    )
    lora_alpha: float | None = option(
        None,
        "The LoRA counts alpha / rank times. Default rank, which is what programs assume that do not read diffusers' "
        "metadata.",
    )
    max_train_steps: int = option(1500, "Optimizer steps.")
    train_batch_size: int = option(1, "Samples a process and step.")
    gradient_accumulation_steps: int = option(1, "Batches an optimizer step.")
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them: less memory.")
    mixed_precision: str | None = option(
        None,
        f"Of forwards and gradients; trained weights stay float32. {', '.join(MIXED_PRECISIONS)}; default what "
        "`accelerate launch` says.",
        MIXED_PRECISIONS,
    )
    allow_tf32: bool = option(False, "TensorFloat-32 matrix products on GPUs that have them: faster, less exact.")
    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.")
    scale_lr: bool = option(False, "Multiply the learning rate by processes, accumulation and batch size.")
    lr_scheduler: str = option("constant", f"One of {', '.join(LR_SCHEDULERS)}.", LR_SCHEDULERS)
    lr_warmup_steps: int = option(0, "Warm-up steps of the learning rate.")
    use_8bit_adam: bool = option(False, "AdamW with 8-bit states, of bitsandbytes.")
    adam_beta1: float = option(0.9, "AdamW's beta 1.")
    adam_beta2: float = option(0.999, "AdamW's beta 2.")
    adam_weight_decay: float = option(1e-4, "AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 leaves them.")
    seed: int = option(0, "Every draw of the run follows from it.")
    save: str | None = option(
        None,
        "full: a stock pipeline folder; unet: its UNet only; partial: the erased weights only; both: full and "
        "partial. With --rank: lora, a file for load_lora_weights; full or unet, with the LoRA fused in; both: full "
        "and lora. The default is full, with --rank lora.",
    )
    checkpointing_steps: int = option(500, "Steps between checkpoints; 0 saves none but when the run is stopped.")
    checkpoints_total_limit: int | None = option(2, "Keep only this many checkpoints.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or latest.")
    validation_prompts: list[str] = option(
        [], "Prompts drawn before and after, side by side, into the folder validation in the output folder."
    )
    num_validation_images: int = option(1, "Images of each validation prompt, and of each prompt on the Hub's card.")
    validation_steps: int = option(100, "Steps between two such pictures; the last step always has one.")
    report_to: str = option(
        "none", f"Where to follow the run, beside log.jsonl in the output folder: {', '.join(TRACKERS)}.", TRACKERS
    )
    logging_dir: str = option("logs", "Folder of the tracker's files, in the output folder.")
    push_to_hub: bool = option(False, "Publish the finished result on the Hugging Face Hub, with a model card.")
    hub_model_id: str | None = option(
        None, "Repository on the Hub: user/name, or a name in your own account; default the output folder's name."
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Default HF_TOKEN, or the one of `hf auth login`. It is written nowhere."},
    )
    hub_private: bool = option(False, "Make the repository private, if it is a new one.")
    overwrite: bool = option(
        False,
        OVERWRITE_HELP,
    )
    dry_run: bool = option(False, "Tell what would be done: weights, forwards, memory. Nothing is written.")

    # Set where a subclass has them.
    ema_decay: ClassVar[float | None] = None
    KEEPS_FROZEN: ClassVar[bool] = True  # whether the run uses what the trained weights were at first
    SAVES: ClassVar[tuple[str, ...]] = ("full", "unet")
    RESULTS: ClassVar[tuple[str, ...]] = result_names()  # what the run's end writes
    LORA_SAVES: ClassVar[tuple[str, ...]] = ("lora", "full", "both", "unet")
    # What is written, where and how often, changes no step; a run that is continued may change it.
    MAY_CHANGE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        "output_dir save checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_prompts "
        "num_validation_images validation_steps report_to logging_dir overwrite dry_run pretrained_model_name_or_path "
        "train_batch_size gradient_accumulation_steps gradient_checkpointing allow_tf32".split()
    )

    def __post_init__(self):
        """Checks every value that can be checked without a model.

        Raises:
            `ValueError`: One line with the name, the value and what is allowed.
        """
        if self.validation_prompts:
            self.validation_prompts = read_concepts(self.validation_prompts, "validation_prompts")
        if self.validation_prompts and self.output_dir is None:
            raise ValueError("validation_prompts: needs an output_dir, where the pictures go")
        self.train_method = resolve_train_method(self.train_method)
        self._resolve_lora()
        self._check_at_least(0, "lr_warmup_steps", "checkpointing_steps", "adam_weight_decay", "max_grad_norm", "seed")
        self._check_at_least(
            1,
            "resolution",
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_validation_images",
            "validation_steps",
            "checkpoints_total_limit",
        )
        if (samples := self.max_train_steps * self.train_batch_size * self.gradient_accumulation_steps) > MAX_SAMPLES:
            raise ValueError(
                f"max_train_steps {self.max_train_steps}: with train_batch_size {self.train_batch_size} and "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} these are {samples:,} samples; "
                f"allowed are at most {MAX_SAMPLES:,}"
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
        for option_name, package in self._needed_packages().items():
            if find_spec(package) is None:
                raise ValueError(f"{option_name}: needs the package {package}, which is not installed")

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
        allowed = self.SAVES if self.rank is None else self.LORA_SAVES
        if self.save is None:
            self.save = allowed[0]
        if self.save not in allowed:
            given = "without" if self.rank is None else "with"
            raise ValueError(f"save '{self.save}': allowed {given} --rank are {', '.join(allowed)}")

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} {value}: must be at least {least}")

    @property
    def may_grow(self) -> bool:
        """Whether a run may be continued to more steps than it was begun with: none of the earlier steps would have
        been another."""
        return self.lr_scheduler in ("constant", "constant_with_warmup")

    @property
    def recorded(self) -> dict:
        """The arguments as records of the run hold them: without what is secret, or does not touch the result."""
        unrecorded = {
            "cache_dir",
            "push_to_hub",
            "overwrite",
            *(name for name in vars(self) if name.startswith("hub_")),
        }
        return {name: value for name, value in asdict(self).items() if name not in unrecorded}

    @property
    def identity(self) -> dict:
        """The arguments that a run shares with those that continue it."""
        free = self.MAY_CHANGE_ON_RESUME | ({"max_train_steps"} if self.may_grow else set())
        return {name: value for name, value in self.recorded.items() if name not in free}

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
            self.check_files()
            self.check_output()

    def check_base_model(self) -> nn.Module:
        """The part of [`~TrainingArguments.check_surroundings`] about the model; returns the structure of the denoiser
        that trains, without weights."""
        raise NotImplementedError

    def check_files(self) -> None:
        """The part of [`~TrainingArguments.check_surroundings`] about files of weights, which are not read yet."""
        name = self.pretrained_model_name_or_path
        check_files(name, f"pretrained_model_name_or_path '{name}'", self.variant)

    def check_output(self) -> None:
        """The part of [`~TrainingArguments.check_surroundings`] about the output folder and what it holds."""
        check_output_dir(self.output_dir)
        check_output_dir(Path(self.output_dir) / self.logging_dir, "logging_dir")
        for name, folder in self.sources.items():
            if folder is not None and Path(place := locate_model(folder)).is_dir():
                check_apart(self.output_dir, place, name)
        checkpoint = self.find_checkpoint()
        if checkpoint is not None and checkpoint_step(checkpoint) > self.max_train_steps:
            raise ValueError(f"max_train_steps {self.max_train_steps}: {checkpoint} is further already")
        if checkpoint is not None:
            check_same_run(checkpoint, self.identity)
        check_claim(self.output_dir, **self._claim(checkpoint))

    @contextmanager
    def claimed_output(self) -> Iterator[None]:
        """Makes the output folder this run's own for the length of the block; without one it does nothing.

        Raises:
            [`OutputFolderError`]: As [`claimed`].
        """
        with nullcontext() if self.output_dir is None else claimed(
            self.output_dir, **self._claim(self.find_checkpoint())
        ):  # fmt: skip
            yield

    @property
    def sources(self) -> dict[str, str | None]:
        """The folders of models that the run reads."""
        return {"the base model": self.pretrained_model_name_or_path}

    def _claim(self, checkpoint: Path | None) -> dict:
        """What the run may find in its output folder: with a checkpoint of its own what it wrote until then, else only
        what is left of the same run that was stopped before the first checkpoint."""
        claim = {"kind": RESULT, "run": {"training": self.identity}, "overwrite": self.overwrite}
        if checkpoint is not None and os.path.realpath(checkpoint.parent) == os.path.realpath(self.output_dir):
            return {**claim, "continues": self.RESULTS, "is_own": self._is_own}
        if list_checkpoints(Path(self.output_dir)) and not self.overwrite:
            raise OutputFolderError(
                f"output_dir {self.output_dir}: holds checkpoints of an earlier run; "
                "give --resume_from_checkpoint latest, another folder, or --overwrite to begin anew"
            )
        return {
            **claim,
            "at_once": True,
            "replaces": (*self.RESULTS, "checkpoint-*"),
            "continues": (LOG_NAME, VALIDATION),
        }

    def _is_own(self, folder: Path) -> bool:
        """Whether the result in a folder is that of an earlier part of this run, by its record alone."""
        try:
            record = load_record(folder)
        except ValueError:
            return False
        resolved = "mixed_precision"  # None here is what the launcher says there
        identity = json.loads(json.dumps(self.identity))
        return all(record.arguments.get(name) == value for name, value in identity.items() if name != resolved)


@typed
@dataclass(kw_only=True)
class SamplingArguments(TrainingArguments):
    """What trainings take that draw latents with a model."""

    num_inference_steps: int = option(50, "Steps of the whole sampling schedule; a latent stops at one of them.")
    sampling_fraction: float = option(
        1.0,
        "Latents stop within this first part of the schedule, in (0, 1]. The paper's is 1; the high "
        "noise levels, where it is decided what a picture shows, come first.",
    )
    sampling_guidance_scale: float = option(3.0, "Classifier-free guidance while latents are drawn.")
    latents_per_trajectory: int = option(
        1,
        "Latents that one run of the sampler gives, at as many stops, for as many successive optimizer steps; they "
        "are drawn at the first of these, and grow old. The papers' is 1.",
    )
    loss_space: str = option(
        "prediction",
        "In what errors are measured: prediction (what the model predicts, the papers) or velocity (high noise levels "
        "count more).",
        LOSS_WEIGHTINGS,
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least(1, "num_inference_steps", "latents_per_trajectory")
        if not 0 < self.sampling_fraction <= 1:
            raise ValueError(f"sampling_fraction {self.sampling_fraction}: must be greater than 0 and at most 1")
        stops = max(1, round(self.sampling_fraction * self.num_inference_steps))
        if self.latents_per_trajectory > stops:
            raise ValueError(
                f"latents_per_trajectory {self.latents_per_trajectory}: must be at most {stops}, the stops of a "
                "trajectory (num_inference_steps * sampling_fraction)"
            )
