"""The options of `train_distill.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusers import SchedulerMixin
from torch import nn

from ..arguments import declared_options, group, option
from ..concepts import read_concepts
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.noise import TARGETS, TIMESTEP_BIASES, NoiseSchedule, TimestepBias
from ..diffusion.trajectories import Trajectories
from ..embedded import check_revision
from ..families import StoredModel, denoiser_names, stored_denoiser
from ..families.students import ALIASES, STUDENTS, empty_student, resolve_student
from ..model_files import find_variant
from ..output_folders import OutputFolderError, check_output_dir
from ..report.results import RESULTS_NAME
from ..training.job import TrainingOptions
from ..training.options import SamplingOptions
from ..training.pictures import INTERPOLATION_MODES
from ..weights.lora import layers_to_adapt
from ..weights.trained import select_parameters
from .evaluation import FOLDER as EVALUATION
from .evaluation import read_evaluation
from .objective import FEATURE_MAPS, DistillationObjective, feature_pairs


_OF_SDD = ("sampling_guidance_scale", "sampling_fraction", "latents_per_trajectory")  # options of --sdd_weight


@dataclass(kw_only=True)
class StudentOptions:
    """The smaller model."""

    student: str | None = option(
        None,
        f"Student architecture, initialised with the teacher's weights: {', '.join(STUDENTS)} (aliases: "
        f"{', '.join(f'{alias} is {name}' for alias, name in ALIASES.items())}).",
        essential=True,
    )
    from_student: str | None = option(
        None,
        "Start from an existing student instead of --student: folder or Hub id, such as an earlier output_dir.",
        essential=True,
        may_change=True,
    )
    student_revision: str | None = option(None, "Revision of --from_student on the Hub.", may_change=True)
    student_variant: str | None = option(
        None, "Variant of the weight files of --from_student, such as fp16.", may_change=True
    )

    def __post_init__(self):
        if (self.student is None) == (self.from_student is None):
            raise ValueError("student: give either --student, an architecture, or --from_student, an existing student")
        if self.student is not None:
            self.student = resolve_student(self.student)

    def hub_arguments(self, cache_dir: str | None) -> dict[str, str]:
        """Arguments of `from_pretrained` in addition to `from_student`."""
        chosen = {"revision": self.student_revision, "variant": self.student_variant, "cache_dir": cache_dir}
        return {name: value for name, value in chosen.items() if value is not None}


@dataclass(kw_only=True)
class DataOptions:
    """Images with captions."""

    dataset_name: str | None = option(
        None, "Training data: Hub id of a dataset of images with captions, or a local copy of it.", essential=True
    )
    dataset_config_name: str | None = option(None, "Configuration of --dataset_name, if it has several.")
    dataset_split: str = option("train", "Split of the training data.")
    train_data_dir: str | None = option(
        None,
        "Local training data, instead of --dataset_name: a folder of images with captions in metadata.csv, .jsonl or "
        ".parquet or in a .txt file next to each image, of parquet files, or of WebDataset tar files (such as "
        "img2dataset writes).",
        essential=True,
        may_change=True,
    )
    image_column: str | None = option(
        None, "Column of the images. Default: image, jpg, png, ..., the first that exists."
    )
    caption_column: str | None = option(
        None,
        "Column of the captions: a text, or a list of texts of which one is chosen at random. Default: text, txt or "
        "caption, the first that exists.",
    )
    max_train_samples: int | None = option(
        None, "Number of samples to use, chosen at random; with --streaming, the first ones. Default: all.", at_least=1
    )
    streaming: bool = option(
        False, "Stream the dataset instead of downloading it first. Samples are shuffled in blocks only."
    )
    forbidden_concepts: list[str] = option(
        [],
        "Leave out samples whose captions name one of these concepts: names, or a .txt file with one per line.",
        essential=True,
    )
    center_crop: bool = option(False, "Crop the center of each image instead of a random part.")
    random_flip: bool = option(False, "Flip images horizontally, with probability 0.5.")
    image_interpolation_mode: str = option(
        "lanczos", f"Interpolation when images are resized: {', '.join(INTERPOLATION_MODES)}.", INTERPOLATION_MODES
    )
    dataloader_num_workers: int = option(
        0, "Number of threads that load images in advance. It does not change results.", at_least=0, may_change=True
    )
    cache_latents: bool = option(
        False,
        "Encode all images and captions once before training and store the results on disk. Needs --center_crop or "
        "square images.",
        may_change=True,
    )
    cache_folder: str | None = option(
        None,
        "Folder for --cache_latents. Several runs can share it. Default: cache in the output folder.",
        may_change=True,
    )
    proportion_empty_prompts: float = option(
        0.0,
        "Share of captions that are replaced by an empty one, for classifier-free guidance; in [0, 1].",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError("dataset_name: give either --dataset_name or --train_data_dir")
        if not (self.dataset_name or self.train_data_dir or "").strip():
            raise ValueError("train_data_dir: is empty; give a folder, or the id of a dataset")
        if self.cache_folder is not None and not self.cache_latents:
            raise ValueError(f"cache_folder {self.cache_folder}: needs --cache_latents")
        if self.cache_latents and self.streaming:
            raise ValueError("cache_latents: stores all samples, --streaming stores none; give only one of them")


@dataclass(kw_only=True)
class LossOptions:
    """The terms of the loss."""

    task_weight: float = option(
        1.0, "Weight of the task loss: the student's prediction against the noise.", at_least=0
    )
    output_weight: float = option(
        1.0, "Weight of the output loss: the student's prediction against the teacher's.", at_least=0
    )
    feature_weight: float = option(
        1.0, "Weight of the feature loss: the student's feature maps against the teacher's.", at_least=0
    )
    feature_map: str = option(
        "bk", f"Feature maps of the feature loss: {', '.join(FEATURE_MAPS)} (see docs/distillation.md).", FEATURE_MAPS
    )
    sdd_weight: float = option(
        0.0,
        "Weight of an SDD loss that erases --forbidden_concepts from the student. 0: off.",
        at_least=0,
    )
    prediction_type: str | None = option(
        None, f"What the student predicts: {' or '.join(TARGETS)}. Default: as the teacher.", TARGETS
    )
    snr_gamma: float | None = option(
        None, "Min-SNR gamma for the task loss (arXiv 2303.09556 uses 5.0). Default: no weighting.", above=0
    )

    def __post_init__(self):
        self.objective()

    def objective(self) -> DistillationObjective:
        return DistillationObjective(self.task_weight, self.output_weight, self.feature_weight)


@dataclass(kw_only=True)
class NoiseOptions:
    """The noise on the images' latents."""

    timestep_bias_strategy: str = option(
        "none",
        f"Timesteps that are sampled more often: {', '.join(TIMESTEP_BIASES)}; as in diffusers' training examples.",
        TIMESTEP_BIASES,
    )
    timestep_bias_multiplier: float = option(
        1.0, "How much more often the timesteps of --timestep_bias_strategy are sampled.", at_least=0
    )
    timestep_bias_portion: float = option(
        0.25,
        "Fraction of the timesteps that --timestep_bias_strategy earlier or later selects, in (0, 1).",
        above=0,
        below=1,
    )

    def __post_init__(self):
        if self.timestep_bias_strategy != "none" and self.timestep_bias_multiplier == 1:
            raise ValueError(
                f"timestep_bias_strategy {self.timestep_bias_strategy}: needs a --timestep_bias_multiplier other than "
                "1"
            )

    @property
    def timestep_bias(self) -> TimestepBias:
        return TimestepBias(
            self.timestep_bias_strategy,
            self.timestep_bias_multiplier,
            self.timestep_bias_portion,
        )


@dataclass(kw_only=True)
class ResultOptions:
    """Which weights are the result, and its evaluation."""

    use_ema: bool = option(False, "Save an exponential moving average (EMA) of the student's weights.")
    ema_decay: float = option(
        0.9999,
        "Decay of the EMA of --use_ema, at most (1 + n) / (10 + n) in step n.",
        at_least=0,
        below=1,
    )
    evaluation: str | None = option(
        None,
        "After training, compare the student, the teacher and, if the teacher is an erased model, the model before "
        "the erasure. A YAML file with options of `diffusers-safe evaluate`, without models and output_dir.",
        may_change=True,
    )


@dataclass(kw_only=True)
class DistillationOptions(TrainingOptions):
    """All options of a distillation. The teacher is `pretrained_model_name_or_path`."""

    student: StudentOptions = group("student")
    data: DataOptions = group("data")
    loss: LossOptions = group("loss")
    noise: NoiseOptions = group("noise")
    result: ResultOptions = group("result")

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "train_method": "full",
        "max_train_steps": 50000,
        "train_batch_size": 64,
        "learning_rate": 5e-5,
        "adam_weight_decay": 1e-2,
    }
    REMOVED: ClassVar[dict[str, Any]] = {
        "noise_offset": 0.0,
        "input_perturbation": 0.0,
        "timestep_bias_begin": 0,
        "timestep_bias_end": 1000,
    }
    KEEPS_FROZEN: ClassVar[bool] = False
    LORA_SAVES: ClassVar[tuple[str, ...]] = ("full",)  # an adapter is useless without the student

    @classmethod
    def helps(cls) -> dict[str, str]:
        sampling = declared_options(SamplingOptions)
        return {
            **super().helps(),
            "pretrained_model_name_or_path": "The teacher: Hub id or folder of a diffusers pipeline.",
            "revision": "Revision of the teacher on the Hub.",
            "variant": "Variant of the teacher's weight files, such as fp16.",
            "num_inference_steps": "Sampling steps of validation images, and of trajectories with --sdd_weight.",
            **{name: f"{sampling[name].facts['help']} Only with --sdd_weight." for name in _OF_SDD},
        }

    def __post_init__(self):
        super().__post_init__()
        self._check_unused()
        if self.loss.sdd_weight and not self.data.forbidden_concepts:
            raise ValueError(f"sdd_weight {self.loss.sdd_weight}: needs --forbidden_concepts, what to erase")
        if self.loss.snr_gamma is not None and self.sampling.loss_space != "prediction":
            raise ValueError(
                f"snr_gamma {self.loss.snr_gamma}: weighs errors of predictions; needs --loss_space prediction"
            )

    def _check_unused(self) -> None:
        """An option that would change nothing is an error."""
        biased, sdd = self.noise.timestep_bias_strategy, self.loss.sdd_weight > 0
        continued = self.student.from_student is not None
        needs = {
            "timestep_bias_multiplier": (biased != "none", "--timestep_bias_strategy"),
            "timestep_bias_portion": (biased in ("earlier", "later"), "--timestep_bias_strategy earlier or later"),
            "ema_decay": (self.result.use_ema, "--use_ema"),
            "student_revision": (continued, "--from_student"),
            "student_variant": (continued, "--from_student"),
            "feature_map": (self.loss.feature_weight > 0, "a --feature_weight above 0"),
            "snr_gamma": (self.loss.task_weight > 0, "a --task_weight above 0"),
            **dict.fromkeys(_OF_SDD, (sdd, "--sdd_weight")),
        }
        declared, values = declared_options(type(self)), self.flat
        for name, (met, need) in needs.items():
            if not met and values[name] != declared[name].default:
                raise ValueError(f"{name} {values[name]}: needs {need}")

    @property
    def ema_decay(self) -> float | None:
        return self.result.ema_decay if self.result.use_ema else None

    def resolve(self) -> None:
        super().resolve()
        if (folder := self.data.train_data_dir) is not None and not Path(folder).is_dir():
            raise ValueError(f"train_data_dir {folder}: no such folder")
        if self.data.forbidden_concepts:
            self.data.forbidden_concepts = read_concepts(self.data.forbidden_concepts, "forbidden_concepts")

    def check_base_model(self) -> nn.Module:
        """Looks at the configs of teacher and student; returns the student's structure, without weights."""
        model, chosen, rank = self.model, self.student, self.weights.rank
        stored = StoredModel(model.pretrained_model_name_or_path, model.resolution, **model.index_arguments)
        teacher = stored.denoiser
        self._check_noise(stored)
        if chosen.student is not None:
            student = empty_student(teacher.config, chosen.student)
        else:
            check_revision(chosen.student_revision, chosen.from_student, "student_revision")
            where = chosen.hub_arguments(model.cache_dir)
            where.pop("variant", None)
            student = stored_denoiser(chosen.from_student, "from_student", **where)
            for name in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type"):
                if (own := student.config[name]) != (there := teacher.config[name]):
                    raise ValueError(f"from_student {chosen.from_student}: has {name} {own}, the teacher {there}")
        if self.loss.feature_weight > 0:
            feature_pairs(student.config, teacher.config, self.loss.feature_map)
        names = select_parameters(student, self.weights.train_method)
        if rank is not None:
            layers_to_adapt(student, names, rank)
        return student

    def _check_noise(self, teacher: StoredModel) -> None:
        scheduler = self.scheduler_for(teacher.make_scheduler())
        noise = NoiseSchedule(scheduler, bias=self.noise.timestep_bias)
        LossWeighting(self.sampling.loss_space, noise.scheduler)
        own = teacher.make_scheduler().config.prediction_type
        if noise.prediction_type != own and self.loss.output_weight > 0:
            raise ValueError(
                f"prediction_type {self.loss.prediction_type}: the teacher predicts {own}, and the student cannot "
                "learn both; needs --output_weight 0"
            )
        if self.loss.sdd_weight:
            sampling, concepts = self.sampling, self.data.forbidden_concepts
            trajectories = Trajectories(teacher.make_scheduler, teacher.latent_shape, sampling.num_inference_steps)
            trajectories.stop_choices(sampling.sampling_fraction, sampling.latents_per_trajectory)
            teacher.check_prompts(concepts)
            teacher.warn_of_unknown_words(concepts, "forbidden_concepts")

    def scheduler_for(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The student's scheduler: its teacher's, with what the student predicts."""
        if self.loss.prediction_type is None:
            return scheduler
        return type(scheduler).from_config(scheduler.config, prediction_type=self.loss.prediction_type)

    def check_files(self) -> None:
        super().check_files()
        student = self.student
        for name in denoiser_names() if student.from_student is not None else ():
            if (folder := Path(student.from_student, name)).is_dir():
                find_variant(folder, student.student_variant)

    def check_surroundings(self) -> None:
        if self.result.evaluation is not None:
            read_evaluation(self.result.evaluation)
        super().check_surroundings()

    @property
    def sources(self) -> dict[str, str | None]:
        return {
            **super().sources,
            "the student": self.student.from_student,
            "the training data": self.data.train_data_dir,
        }

    def _claim(self) -> dict:
        claim, folder = super()._claim(), self.output.output_dir
        report = Path(folder) / EVALUATION / RESULTS_NAME
        if self.result.evaluation is not None and "replaces" in claim and report.exists() and not claim["overwrite"]:
            raise OutputFolderError(
                f"output_dir {folder}: holds an evaluation of another run; give another folder, or --overwrite to "
                "replace it"
            )
        return claim

    def check_output(self) -> None:
        if (folder := self.data.cache_folder) is not None:
            check_output_dir(folder, "cache_folder")
            for name in ("model_index.json", "config.json"):
                if Path(folder, name).exists():
                    raise OutputFolderError(f"cache_folder {folder}: holds a model ({name}); name another")
        super().check_output()
