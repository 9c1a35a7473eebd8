"""The options that every training takes, in groups; the names are those of diffusers' training examples."""

from dataclasses import dataclass
from pathlib import Path

from diffusers.optimization import SchedulerType

from ..arguments import option, required
from ..diffusion.loss_weighting import LOSS_SPACE_HELP, LOSS_WEIGHTINGS
from ..families import TEXT_ENCODERS, TRAIN_METHODS, denoiser_names, resolve_train_method
from ..hub import check_model_id, default_model_id
from ..output_folders import OVERWRITE_HELP
from .checkpoints import checkpoint_step, list_checkpoints


LOG_NAME, VALIDATION = "log.jsonl", "validation"  # in the output folder
MIXED_PRECISIONS = ("no", "fp16", "bf16")
MAX_SAMPLES = 10**11  # of a run: a hundred times what the largest models were trained on
TRACKERS = ("tensorboard", "wandb", "none")
# All of diffusers' but piecewise_constant, whose rules have no option.
LR_SCHEDULERS = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)


@dataclass(kw_only=True)
class ModelOptions:
    """The model and where it is."""

    pretrained_model_name_or_path: str = required("Hub id or folder of a diffusers pipeline.", may_change=True)
    revision: str | None = option(None, "Revision of the model on the Hub.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    cache_dir: str | None = option(None, "Folder for downloads from the Hub.", recorded=False)
    resolution: int | None = option(
        None,
        "Height and width in pixels of the images whose latents are trained on, a multiple of the autoencoder's "
        "downsampling factor (8 for Stable Diffusion). Default: the model's own.",
        at_least=1,
    )

    @property
    def hub_arguments(self) -> dict[str, str]:
        """Arguments of `from_pretrained` in addition to the name."""
        chosen = {"revision": self.revision, "variant": self.variant, "cache_dir": self.cache_dir}
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def index_arguments(self) -> dict[str, str]:
        """The same for the index alone."""
        return {name: value for name, value in self.hub_arguments.items() if name != "variant"}


@dataclass(kw_only=True)
class WeightOptions:
    """Which weights train, and as what."""

    train_method: str = option(
        "xattn",
        f"Weights to train: {'; '.join(f'{name} ({method.described})' for name, method in TRAIN_METHODS.items())}.",
        essential=True,
    )
    rank: int | None = option(
        None,
        "Train a LoRA of this rank instead of the weights themselves: adapters on the linear and convolution layers "
        "that --train_method selects.",
        at_least=1,
        essential=True,
    )
    lora_alpha: float | None = option(
        None,
        "The LoRA is scaled by alpha / rank. Default: the rank, which programs that ignore the file's metadata assume "
        "as well.",
        above=0,
    )

    def __post_init__(self):
        self.train_method = resolve_train_method(self.train_method)
        if self.rank is not None and self.train_method == TEXT_ENCODERS:
            raise ValueError(f"rank {self.rank}: not with train_method {TEXT_ENCODERS}, which trains whole weights")
        if self.rank is None and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha {self.lora_alpha}: needs --rank")
        if self.rank is not None and self.lora_alpha is None:
            self.lora_alpha = float(self.rank)


@dataclass(kw_only=True)
class OptimizerOptions:
    """AdamW and its learning rate."""

    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.", above=0, essential=True)
    scale_lr: bool = option(
        False, "Multiply --learning_rate by the total batch size: processes, accumulation and batch."
    )
    lr_scheduler: str = option(
        "constant", f"Schedule of the learning rate: {', '.join(LR_SCHEDULERS)}.", LR_SCHEDULERS
    )
    lr_warmup_steps: int = option(0, "Warm-up steps of the learning rate.", at_least=0)
    use_8bit_adam: bool = option(False, "Use AdamW with 8-bit states; needs bitsandbytes.")
    adam_beta1: float = option(0.9, "AdamW's beta 1.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's beta 2.", at_least=0, below=1)
    adam_weight_decay: float = option(1e-4, "AdamW's weight decay.", at_least=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0: no clipping.", at_least=0)

    def __post_init__(self):
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(f"lr_warmup_steps {self.lr_warmup_steps}: needs --lr_scheduler constant_with_warmup")


@dataclass(kw_only=True)
class RunOptions:
    """Steps, batches and arithmetic."""

    max_train_steps: int = option(1500, "Number of optimizer steps.", at_least=1, essential=True)
    train_batch_size: int = option(1, "Batch size per process.", at_least=1, may_change=True, essential=True)
    gradient_accumulation_steps: int = option(1, "Number of batches per optimizer step.", at_least=1, may_change=True)
    gradient_checkpointing: bool = option(
        False, "Recompute activations instead of storing them: less memory, slower.", may_change=True
    )
    mixed_precision: str | None = option(
        None,
        f"Mixed precision: {', '.join(MIXED_PRECISIONS)}. Trained weights stay float32. Default: the setting of "
        "`accelerate launch`.",
        MIXED_PRECISIONS,
    )
    allow_tf32: bool = option(
        False, "Allow TensorFloat-32 matrix products on GPUs that have them: faster, less exact.", may_change=True
    )

    def __post_init__(self):
        if self.num_samples > MAX_SAMPLES:
            raise ValueError(
                f"max_train_steps {self.max_train_steps}: with train_batch_size {self.train_batch_size} and "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} these are {self.num_samples:,} "
                f"samples; allowed are at most {MAX_SAMPLES:,}"
            )

    @property
    def num_samples(self) -> int:
        """Of one process."""
        return self.max_train_steps * self.train_batch_size * self.gradient_accumulation_steps


@dataclass(kw_only=True)
class OutputOptions:
    """What is written where."""

    output_dir: str | None = required("Output folder: the result, its record, the log, checkpoints.", may_change=True)
    save: str | None = option(
        None,
        "What is saved.",  # see `describe_saves`
        may_change=True,
        essential=True,
    )
    overwrite: bool = option(False, OVERWRITE_HELP, recorded=False, may_change=True, essential=True)
    dry_run: bool = option(
        False,
        "Print the plan (weights, forward passes, memory) and exit. Nothing is written.",
        may_change=True,
        essential=True,
    )
    seed: int = option(0, "Random seed of the run.", at_least=0, below=2**32)

    def resolve_save(self, allowed: tuple[str, ...], lora: bool) -> None:
        """Sets `save` to its default, the first of those that are allowed.

        Raises:
            `ValueError`: If another one was given.
        """
        self.save = self.save or allowed[0]
        if self.save not in allowed:
            given = " with --rank" if lora else " without --rank" if len(allowed) > 1 else ""
            raise ValueError(f"save '{self.save}': allowed{given} are {', '.join(allowed)}")


def describe_saves(plain: tuple[str, ...], lora: tuple[str, ...] = ()) -> str:
    """The help of `save`: its values in a job, the default first, and those with `--rank`, if there is that option."""
    meanings = {
        "full": "a stock pipeline folder",
        "partial": "only the changed weights",
        "both": "full and partial",
        **dict.fromkeys(denoiser_names(), "only the denoiser"),
    }
    text = f"What is saved: {', '.join(f'{name} ({meanings[name]})' for name in (*plain, *denoiser_names()))}. "
    if not lora:
        return f"{text}Default: {plain[0]}."
    fused = " or ".join(name for name in (*lora, *denoiser_names()) if name not in ("lora", "both"))
    meanings = {
        "lora": "lora (a file for load_lora_weights)",
        "full": f"{fused} (with the LoRA fused in)",
        "both": "both (full and lora)",
    }
    text += f"With --rank: {', '.join(meanings[name] for name in lora)}. "
    return f"{text}Default: {plain[0]}{f'; with --rank: {lora[0]}' if lora[0] != plain[0] else ''}."


@dataclass(kw_only=True)
class CheckpointOptions:
    """Checkpoints, and a tracker to follow the run."""

    checkpointing_steps: int = option(
        500, "Training steps between checkpoints. 0: only when the run is stopped.", at_least=0, may_change=True
    )
    checkpoints_total_limit: int | None = option(
        2, "Number of checkpoints to keep, the newest ones.", at_least=1, may_change=True
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Continue from a checkpoint: its folder, or latest for the newest one in the output folder.",
        may_change=True,
        essential=True,
    )
    report_to: str = option(
        "none",
        f"Experiment tracker, in addition to log.jsonl in the output folder: {', '.join(TRACKERS)}.",
        TRACKERS,
        may_change=True,
    )
    logging_dir: str = option("logs", "Folder for the files of --report_to, in the output folder.", may_change=True)

    def find(self, output_dir: str | None) -> Path | None:
        """The checkpoint to continue from, if one was asked for.

        Raises:
            `ValueError`: If it does not exist.
        """
        if self.resume_from_checkpoint is None:
            return None
        if self.resume_from_checkpoint == "latest":
            if found := list_checkpoints(Path(output_dir)):
                return found[-1]
            raise ValueError(f"resume_from_checkpoint latest: no checkpoint in {output_dir}")
        path = Path(self.resume_from_checkpoint)
        try:
            checkpoint_step(path)
        except ValueError:
            raise ValueError(f"resume_from_checkpoint {path}: not a folder named checkpoint-<step>") from None
        if not path.is_dir():
            raise ValueError(f"resume_from_checkpoint {path}: no such folder")
        return path


@dataclass(kw_only=True)
class ValidationOptions:
    """Images before and after, while a run goes on."""

    validation_prompts: list[str] = option(
        [],
        "Generate images for these prompts with the model before the run and with the new weights; they are saved "
        "side by side in OUTPUT_DIR/validation. Prompts, or a .txt file with one per line.",
        may_change=True,
        essential=True,
    )
    num_validation_images: int = option(
        1, "Images per validation prompt, also in the model card on the Hub.", at_least=1, may_change=True
    )
    validation_steps: int = option(
        100, "Training steps between validation images. The last step always has one.", at_least=1, may_change=True
    )


@dataclass(kw_only=True)
class HubOptions:
    """Publishing on the Hugging Face Hub."""

    push_to_hub: bool = option(
        False, "Publish the finished result on the Hugging Face Hub, with a model card.", recorded=False
    )
    hub_model_id: str | None = option(
        None,
        "Repository on the Hub: user/name, or a name in your own account. Default: the output folder's name.",
        recorded=False,
    )
    hub_token: str | None = option(
        None,
        "Token for the Hub. Default: HF_TOKEN, or the one of `hf auth login`. It is never written to a file.",
        recorded=False,
        secret=True,
    )
    hub_private: bool = option(False, "Make the repository private if it is new.", recorded=False)

    def __post_init__(self):
        useless = [name for name in ("hub_model_id", "hub_token", "hub_private") if getattr(self, name)]
        if useless and not self.push_to_hub:
            raise ValueError(f"{', '.join(useless)}: without --push_to_hub nothing is published; give it, too")

    def resolve(self, output_dir: str | None) -> None:
        """Names the repository after the output folder unless it has a name."""
        if self.push_to_hub:
            if output_dir is None:
                raise ValueError("push_to_hub: needs an output_dir")
            self.hub_model_id = self.hub_model_id or default_model_id(output_dir)
            check_model_id(self.hub_model_id)


@dataclass(kw_only=True)
class SamplingOptions:
    """Noisy latents, sampled with a model."""

    num_inference_steps: int = option(
        50, "Number of steps of the sampling schedule. A trajectory stops at one of them.", at_least=1
    )
    sampling_fraction: float = option(
        1.0,
        "Stop trajectories within this first fraction of the schedule, in (0, 1]. Below 1, only high noise levels are "
        "trained, which determine the content of an image. The papers use 1.",
        above=0,
        at_most=1,
    )
    sampling_guidance_scale: float = option(
        3.0,
        "Scale of classifier-free guidance when latents are sampled; at 1 or less it is off. For FLUX.1-dev, the "
        "guidance scale that the model takes as input.",
    )
    latents_per_trajectory: int = option(
        1,
        "Number of latents taken from one trajectory, for as many successive training steps. The papers use 1.",
        at_least=1,
    )
    loss_space: str = option(
        "prediction",
        LOSS_SPACE_HELP,
        LOSS_WEIGHTINGS,
    )

    def __post_init__(self):
        stops = max(1, round(self.sampling_fraction * self.num_inference_steps))
        if self.latents_per_trajectory > stops:
            raise ValueError(
                f"latents_per_trajectory {self.latents_per_trajectory}: must be at most {stops}, the stops of a "
                "trajectory (num_inference_steps * sampling_fraction)"
            )
