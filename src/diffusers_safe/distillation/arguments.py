"""Command-line arguments of `train_distill.py`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from diffusers import SchedulerMixin
from torch import nn

from ..arguments import typed
from ..concepts import read_concepts
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.noise import TARGETS, TIMESTEP_BIASES, NoiseSchedule, TimestepBias
from ..diffusion.trajectories import Trajectories
from ..families import StoredModel, stored_unet
from ..families.students import STUDENTS, empty_student, resolve_student
from ..loading import find_variant
from ..output_folders import OutputFolderError, check_output_dir
from ..report.results import RESULTS_NAME
from ..training.arguments import SamplingArguments, option, required
from ..training.pictures import INTERPOLATION_MODES
from ..weights.lora import layers_to_adapt
from ..weights.trained import select_parameters
from .evaluation import FOLDER as EVALUATION
from .evaluation import read_evaluation
from .objective import FEATURE_MAPS, DistillationObjective, feature_pairs


@typed
@dataclass(kw_only=True)
class DistillationArguments(SamplingArguments):
    """Arguments of knowledge distillation. The teacher is `pretrained_model_name_or_path`."""

    student: str | None = option(
        None,
        f"What is built of the teacher's blocks: {', '.join(STUDENTS)} (aliases sd_small, sd_tiny).",
    )
    from_student: str | None = option(
        None, "Go on from this student instead: a folder or Hub id with a UNet, such as an earlier output_dir."
    )
    student_revision: str | None = option(None, "Its revision on the Hub; --revision is the teacher's.")
    student_variant: str | None = option(None, "Its variant, such as fp16; --variant is the teacher's.")
    dataset_name: str | None = option(None, "Hub id of a dataset of pictures with captions, or its folder.")
    dataset_config_name: str | None = option(None, "Its configuration, if it has several.")
    dataset_split: str = option("train", "Its split.")
    train_data_dir: str | None = option(
        None,
        "A folder instead: pictures with a metadata.csv or .jsonl or a .txt file next to each, parquet files, tar"
        " files of a webdataset, or what img2dataset writes.",
    )
    image_column: str | None = option(
        None, "The column of the pictures; default image, jpg, png, ..., whichever it has."
    )
    caption_column: str | None = option(
        None,
        "The column of the captions: a text, or several of which one is drawn; default text, txt or caption, whichever"
        " it has.",
    )
    max_train_samples: int | None = option(None, "Only so many samples, drawn at random; of a stream the first ones.")
    streaming: bool = option(False, "Read the samples as they come instead of all before; shuffled in part only.")
    forbidden_concepts: list[str] = option(
        [], "Samples whose captions name one of these are left out (names, or one .txt file)."
    )
    center_crop: bool = option(False, "Cut the middle out of a picture; else a part drawn at random.")
    random_flip: bool = option(False, "Mirror pictures, left to right, half of the time.")
    image_interpolation_mode: str = option(
        "lanczos", f"Of resizing: {', '.join(INTERPOLATION_MODES)}.", INTERPOLATION_MODES
    )
    dataloader_num_workers: int = option(0, "Threads that read pictures ahead; they change no result.")
    cache_latents: bool = option(
        False,
        "Run the autoencoder and the text encoders once, ahead, and keep what they give on disk; needs center_crop, "
        "or square pictures.",
    )
    cache_folder: str | None = option(
        None, "Where; default the folder cache in the output folder. Other runs may share it."
    )
    task_weight: float = option(1.0, "Weight of the error against the noise itself.")
    output_weight: float = option(1.0, "Weight of the error against the teacher's prediction.")
    feature_weight: float = option(1.0, "Weight of the errors against the teacher's feature maps.")
    feature_map: str = option("bk", f"Which feature maps: {', '.join(FEATURE_MAPS)} (docs/methods.md).", FEATURE_MAPS)
    sdd_weight: float = option(
        0.0,
        "Weight of the loss of SDD on the student, for forbidden_concepts: their predictions move to the "
        "unconditional one.",
    )
    prediction_type: str | None = option(
        None, f"What the student is to predict, {' or '.join(TARGETS)}; default as its teacher.", TARGETS
    )
    snr_gamma: float | None = option(None, "Weigh the task's errors as Min-SNR does; 5.0 there.")
    noise_offset: float = option(0.0, "Of an offset of the noise that is the same all over a channel.")
    input_perturbation: float = option(0.0, "Noise of the input that the target does not have; 0.1 in the paper.")
    timestep_bias_strategy: str = option(
        "none",
        f"Which timesteps are drawn more often: {', '.join(TIMESTEP_BIASES)}, as in diffusers.",
        TIMESTEP_BIASES,
    )
    timestep_bias_multiplier: float = option(1.0, "How many times as often.")
    timestep_bias_portion: float = option(0.25, "The first or last share of timesteps that is meant; in (0, 1).")
    timestep_bias_begin: int = option(0, "Where the range begins.")
    timestep_bias_end: int = option(1000, "Where the range ends.")
    proportion_empty_prompts: float = option(
        0.0, "Share of samples without their caption, for classifier-free guidance; in [0, 1]."
    )
    output_dir: str | None = required("Where the student's pipeline, distillation.json and checkpoints go.")
    save: str | None = option(
        None, "full: a stock pipeline folder; unet: its UNet only. Of a LoRA (--rank), fused in. The default is full."
    )
    use_ema: bool = option(False, "Publish an average of the student's weights.")
    ema_decay: float = option(0.9999, "m of that average, in [0, 1); smaller in the first steps: (1 + n) / (10 + n).")
    evaluation: str | None = option(
        None,
        "At the end compare student, teacher and, of an erased teacher, the model before: a YAML file with the "
        "options of `diffusers-safe evaluate` but models and output_dir.",
    )
    train_method: str = option("full", "Which weights of the student train, as for erasures (train_sdd.py --help).")
    max_train_steps: int = option(50000, "Optimizer steps.")
    train_batch_size: int = option(64, "Samples a process and step.")
    learning_rate: float = option(5e-5, "Peak learning rate of AdamW.")
    adam_weight_decay: float = option(1e-2, "AdamW's weight decay.")

    KEEPS_FROZEN: ClassVar[bool] = False
    LORA_SAVES: ClassVar[tuple[str, ...]] = ("full", "unet")  # an adapter of a student that nobody has is of no use
    MAY_CHANGE_ON_RESUME: ClassVar[frozenset[str]] = SamplingArguments.MAY_CHANGE_ON_RESUME | {
        "dataloader_num_workers",
        "cache_latents",
        "cache_folder",
        "evaluation",
        "from_student",
        "student_revision",
        "student_variant",
        "train_data_dir",
    }

    def __post_init__(self):
        super().__post_init__()
        self.forbidden_concepts = (
            read_concepts(self.forbidden_concepts, "forbidden_concepts") if self.forbidden_concepts else []
        )
        if (self.student is None) == (self.from_student is None):
            raise ValueError("student: give either --student, what is to be built, or --from_student, to go on from")
        if self.student is not None:
            self.student = resolve_student(self.student)
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError("dataset_name: give either --dataset_name or --train_data_dir")
        if self.train_data_dir is not None and not Path(self.train_data_dir).is_dir():
            raise ValueError(f"train_data_dir {self.train_data_dir}: no such folder")
        self._check_at_least(
            0,
            "sdd_weight",
            "noise_offset",
            "input_perturbation",
            "timestep_bias_multiplier",
            "timestep_bias_begin",
            "dataloader_num_workers",
        )
        self._check_at_least(1, "max_train_samples", "timestep_bias_end")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"snr_gamma {self.snr_gamma}: must be greater than 0")
        if not 0 < self.timestep_bias_portion < 1:
            raise ValueError(f"timestep_bias_portion {self.timestep_bias_portion}: must be between 0 and 1")
        if self.timestep_bias_begin >= self.timestep_bias_end:
            raise ValueError(
                f"timestep_bias_begin {self.timestep_bias_begin}: must be less than timestep_bias_end "
                f"{self.timestep_bias_end}"
            )
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts {self.proportion_empty_prompts}: must be in [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}: must be at least 0 and less than 1")
        if self.sdd_weight and not self.forbidden_concepts:
            raise ValueError(f"sdd_weight {self.sdd_weight}: needs --forbidden_concepts, what to erase")
        if self.cache_folder is not None and not self.cache_latents:
            raise ValueError(f"cache_folder {self.cache_folder}: needs --cache_latents")
        if self.cache_latents and self.streaming:
            raise ValueError("cache_latents: keeps all samples, --streaming none; give one of them")
        self.make_objective()
        self._check_useless()
        if self.snr_gamma is not None and self.loss_space != "prediction":
            raise ValueError(
                f"snr_gamma {self.snr_gamma}: weighs errors of predictions; needs --loss_space prediction"
            )

    def _check_useless(self) -> None:
        """An option that would change nothing is a mistake, told as one."""
        biased = self.timestep_bias_strategy
        needs = {
            "timestep_bias_multiplier": (biased != "none", "--timestep_bias_strategy"),
            "timestep_bias_portion": (biased in ("earlier", "later"), "--timestep_bias_strategy earlier or later"),
            "timestep_bias_begin": (biased == "range", "--timestep_bias_strategy range"),
            "timestep_bias_end": (biased == "range", "--timestep_bias_strategy range"),
            "ema_decay": (self.use_ema, "--use_ema"),
            "student_revision": (self.from_student is not None, "--from_student"),
            "student_variant": (self.from_student is not None, "--from_student"),
            "feature_map": (self.feature_weight > 0, "a --feature_weight above 0"),
            "snr_gamma": (self.task_weight > 0, "a --task_weight above 0"),
            "sampling_guidance_scale": (self.sdd_weight > 0, "--sdd_weight"),
            "sampling_fraction": (self.sdd_weight > 0, "--sdd_weight"),
            "latents_per_trajectory": (self.sdd_weight > 0, "--sdd_weight"),
        }
        defaults = {item.name: item.default for item in fields(self)}
        for name, (met, need) in needs.items():
            if not met and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} {getattr(self, name)}: needs {need}")
        if biased != "none" and self.timestep_bias_multiplier == 1:
            raise ValueError(f"timestep_bias_strategy {biased}: needs a --timestep_bias_multiplier other than 1")

    def make_objective(self) -> DistillationObjective:
        return DistillationObjective(self.task_weight, self.output_weight, self.feature_weight)

    @property
    def timestep_bias(self) -> TimestepBias:
        return TimestepBias(
            self.timestep_bias_strategy,
            self.timestep_bias_multiplier,
            self.timestep_bias_portion,
            self.timestep_bias_begin,
            self.timestep_bias_end,
        )

    def check_base_model(self) -> nn.Module:
        """Looks at the configs of teacher and student; returns the student's structure, without weights."""
        name = self.pretrained_model_name_or_path
        stored = StoredModel(name, self.resolution, **self.index_arguments)
        teacher = stored.denoiser
        self._check_noise(stored)
        if self.student is not None:
            student = empty_student(teacher.config, self.student)
        else:
            where = {name: value for name, value in self.student_arguments.items() if name != "variant"}
            student = stored_unet(self.from_student, "from_student", **where)
            for name in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type"):
                if (own := student.config[name]) != (there := teacher.config[name]):
                    raise ValueError(f"from_student {self.from_student}: has {name} {own}, the teacher {there}")
        if self.feature_weight > 0:
            feature_pairs(student.config, teacher.config, self.feature_map)
        names = select_parameters(student, self.train_method)
        if self.rank is not None:
            layers_to_adapt(student, names, self.rank)
        return student

    def _check_noise(self, teacher: StoredModel) -> None:
        scheduler = self.scheduler_for(teacher.make_scheduler())
        noise = NoiseSchedule(scheduler, bias=self.timestep_bias)
        LossWeighting(self.loss_space, noise.scheduler)
        own = teacher.make_scheduler().config.prediction_type
        if noise.prediction_type != own and self.output_weight > 0:
            raise ValueError(
                f"prediction_type {self.prediction_type}: the teacher predicts {own}, and the student cannot learn "
                "both; needs --output_weight 0"
            )
        if self.sdd_weight:
            scheduled = (teacher.make_scheduler, teacher.latent_shape, self.num_inference_steps)
            Trajectories(*scheduled).stop_choices(self.sampling_fraction, self.latents_per_trajectory)
            teacher.check_prompts(self.forbidden_concepts)
            teacher.warn_of_unknown_words(self.forbidden_concepts, "forbidden_concepts")

    def scheduler_for(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The student's scheduler: its teacher's, with what the student predicts."""
        if self.prediction_type is None:
            return scheduler
        return type(scheduler).from_config(scheduler.config, prediction_type=self.prediction_type)

    @property
    def student_arguments(self) -> dict[str, str]:
        """What `from_pretrained` takes beside `from_student`."""
        chosen = {"revision": self.student_revision, "variant": self.student_variant, "cache_dir": self.cache_dir}
        return {name: value for name, value in chosen.items() if value is not None}

    def check_files(self) -> None:
        super().check_files()
        if self.from_student is not None and (folder := Path(self.from_student, "unet")).is_dir():
            find_variant(folder, self.student_variant)

    def check_surroundings(self) -> None:
        if self.evaluation is not None:
            read_evaluation(self.evaluation)
        super().check_surroundings()

    @property
    def sources(self) -> dict[str, str | None]:
        return {**super().sources, "the student": self.from_student, "the training data": self.train_data_dir}

    def _claim(self, checkpoint: Path | None) -> dict:
        claim = super()._claim(checkpoint)
        report = Path(self.output_dir) / EVALUATION / RESULTS_NAME
        if self.evaluation is not None and "replaces" in claim and report.exists() and not self.overwrite:
            raise OutputFolderError(
                f"output_dir {self.output_dir}: holds an evaluation of another run; give another folder, or "
                "--overwrite to replace it"
            )
        return claim

    def check_output(self) -> None:
        if self.cache_folder is not None:
            check_output_dir(self.cache_folder, "cache_folder")
            for name in ("model_index.json", "config.json"):
                if Path(self.cache_folder, name).exists():
                    raise OutputFolderError(f"cache_folder {self.cache_folder}: holds a model ({name}); name another")
        super().check_output()
