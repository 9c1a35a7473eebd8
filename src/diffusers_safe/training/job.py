"""What a job is asked to do: groups of options composed, and all that is checked before it starts."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from torch import nn

from ..arguments import OptionGroups, group
from ..concepts import read_concepts
from ..embedded import check_revision, locate_model
from ..families import check_files, denoiser_names
from ..formats import result_names
from ..hub import check_push
from ..output_folders import RESULT, OutputFolderError, check_apart, check_claim, check_output_dir, claimed
from ..provenance import load_record
from .checkpoints import check_files as check_checkpoint
from .checkpoints import check_same_run, checkpoint_step, list_checkpoints
from .options import (
    LOG_NAME,
    VALIDATION,
    CheckpointOptions,
    HubOptions,
    ModelOptions,
    OptimizerOptions,
    OutputOptions,
    RunOptions,
    SamplingOptions,
    ValidationOptions,
    WeightOptions,
    describe_saves,
)


@dataclass(kw_only=True)
class JobOptions(OptionGroups):
    """What every job takes that makes a model out of a model.

    Parsing reads no file: [`~JobOptions.resolve`] reads lists, [`~JobOptions.check_surroundings`] looks at models and
    folders.
    """

    model: ModelOptions = group("model")
    output: OutputOptions = group("output")
    validation: ValidationOptions = group("validation")
    hub: HubOptions = group("Hugging Face Hub")

    SAVES: ClassVar[tuple[str, ...]] = ("full",)  # what `save` may be, besides the name of a denoiser

    @classmethod
    def helps(cls) -> dict[str, str]:
        return {"save": describe_saves(cls.SAVES)}

    def __post_init__(self):
        denoisers = denoiser_names() if self.saves_denoiser else ()
        self.output.resolve_save((*self.allowed_saves, *denoisers), self.is_lora)
        self.hub.resolve(self.output.output_dir)
        if self.validation.validation_prompts and self.output.output_dir is None:
            raise ValueError("validation_prompts: needs an output_dir, where the images go")

    @property
    def is_lora(self) -> bool:
        """Whether what trains is a LoRA."""
        return False

    @property
    def saves_denoiser(self) -> bool:
        """Whether the result may be the denoiser alone."""
        return True

    @property
    def allowed_saves(self) -> tuple[str, ...]:
        """The values of `save` but names of denoisers, the default first."""
        return self.SAVES

    @property
    def recorded(self) -> dict:
        """The options as records hold them: without what is secret or does not affect the result."""
        left_out = self.select("recorded", False)
        return {name: value for name, value in self.flat.items() if name not in left_out}

    @property
    def identity(self) -> dict:
        """The options that a run shares with those that continue it."""
        free = self.select("may_change", True)
        return {name: value for name, value in self.recorded.items() if name not in free}

    # --- what lies outside the options -------------------------------------------------------------------------------

    def resolve(self) -> None:
        """Reads the lists that were given as files, and looks for optional packages.

        Raises:
            `ValueError`: If a list cannot be read or contradicts another, or a package is not installed.
        """
        validation = self.validation
        if validation.validation_prompts:
            validation.validation_prompts = read_concepts(validation.validation_prompts, "validation_prompts")

    def check_surroundings(self) -> None:
        """Checks the model's configs, the checkpoint, and the output folder. Nothing is created.

        Raises:
            `ValueError`: One line that says what is wrong.
        """
        self.resolve()
        check_revision(self.model.revision, self.model.pretrained_model_name_or_path)
        if self.hub.push_to_hub:
            check_push(self.hub.hub_model_id, self.hub.hub_token)
        self.check_base_model()
        if not self.output.dry_run:
            self.check_files()
            self.check_output()

    def check_base_model(self) -> nn.Module:
        """Checks the model by its configs; returns the structure of the denoiser that trains, without weights."""
        raise NotImplementedError

    def check_files(self) -> None:
        """Checks the files of weights, without reading them."""
        name = self.model.pretrained_model_name_or_path
        check_files(name, f"pretrained_model_name_or_path '{name}'", self.model.variant)

    def check_output(self) -> None:
        """Checks the output folder and what it holds."""
        folder = self.output.output_dir
        check_output_dir(folder)
        for name, source in self.sources.items():
            if source is not None and Path(place := locate_model(source)).is_dir():
                check_apart(folder, place, name)
        check_claim(folder, **self._claim())

    @contextmanager
    def claimed_output(self) -> Iterator[None]:
        """Makes the output folder this run's own for the length of the block; without one it does nothing.

        Raises:
            [`OutputFolderError`]: As [`claimed`].
        """
        folder = self.output.output_dir
        with nullcontext() if folder is None else claimed(folder, **self._claim()):
            yield

    @property
    def sources(self) -> dict[str, str | None]:
        """The folders of models that the run reads."""
        return {"the base model": self.model.pretrained_model_name_or_path}

    def _claim(self) -> dict:
        """What the run may find in its output folder."""
        claim = {"kind": RESULT, "run": {"training": self.identity}, "overwrite": self.output.overwrite}
        replaces = (*result_names(), "checkpoint-*")
        return {**claim, "at_once": True, "replaces": replaces, "continues": (LOG_NAME, VALIDATION)}


@dataclass(kw_only=True)
class TrainingOptions(JobOptions):
    """What every training takes."""

    weights: WeightOptions = group("trained weights")
    run: RunOptions = group("training")
    optimizer: OptimizerOptions = group("optimizer")
    sampling: SamplingOptions = group("sampling of latents")
    checkpoints: CheckpointOptions = group("checkpoints and log")

    KEEPS_FROZEN: ClassVar[bool] = True  # whether the run uses the initial values of the trained weights
    LORA_SAVES: ClassVar[tuple[str, ...]] = ("lora", "full", "both")

    @classmethod
    def helps(cls) -> dict[str, str]:
        return {"save": describe_saves(cls.SAVES, cls.LORA_SAVES)}

    @property
    def is_lora(self) -> bool:
        return self.weights.rank is not None

    @property
    def allowed_saves(self) -> tuple[str, ...]:
        return self.LORA_SAVES if self.is_lora else self.SAVES

    @property
    def ema_decay(self) -> float | None:
        """Decay of the average of the weights, if the run has one."""
        return None

    @property
    def may_grow(self) -> bool:
        """Whether a run may be continued to more steps than it was begun with: earlier steps stay the same."""
        return self.optimizer.lr_scheduler in ("constant", "constant_with_warmup")

    @property
    def identity(self) -> dict:
        return {name: v for name, v in super().identity.items() if name != "max_train_steps" or not self.may_grow}

    @property
    def tracker_dir(self) -> str:
        return str(Path(self.output.output_dir) / self.checkpoints.logging_dir)

    def resolve(self) -> None:
        super().resolve()
        needed = {"use_8bit_adam": "bitsandbytes"} if self.optimizer.use_8bit_adam else {}
        if (tracker := self.checkpoints.report_to) != "none":
            needed[f"report_to {tracker}"] = tracker
        for name, package in needed.items():
            if find_spec(package) is None:
                raise ValueError(f"{name}: needs the package {package}, which is not installed")

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to continue from, if one was asked for.

        Raises:
            `ValueError`: If it does not exist.
        """
        return self.checkpoints.find(self.output.output_dir)

    def check_output(self) -> None:
        check_output_dir(self.output.output_dir)
        self._check_logging_dir()
        if (checkpoint := self.find_checkpoint()) is not None:
            if (step := checkpoint_step(checkpoint)) > self.run.max_train_steps:
                raise ValueError(f"max_train_steps {self.run.max_train_steps}: {checkpoint} is already at step {step}")
            check_same_run(checkpoint, self.identity)
            check_checkpoint(checkpoint)
        super().check_output()

    def _check_logging_dir(self) -> None:
        """Trackers write there without asking: it must not be a place of other files."""
        name = self.checkpoints.logging_dir
        check_output_dir(name, "logging_dir")
        first = Path(os.path.normpath(name)).parts[0]
        taken = (".*", "/", LOG_NAME, VALIDATION, "cache", "checkpoint-*", *result_names())
        if any(fnmatch(first, pattern) for pattern in taken):
            raise ValueError(f"logging_dir '{name}': must be a folder of its own in the output folder, such as logs")
        check_output_dir(self.tracker_dir, "logging_dir")

    def _claim(self) -> dict:
        """When resuming: everything that the run has written. Otherwise: leftovers of the same run from before its
        first checkpoint."""
        folder, claim, checkpoint = self.output.output_dir, super()._claim(), self.find_checkpoint()
        if checkpoint is not None and os.path.realpath(checkpoint.parent) == os.path.realpath(folder):
            own = {name: claim[name] for name in ("kind", "run", "overwrite")}
            return {**own, "continues": result_names(), "is_own": self._is_own}
        if list_checkpoints(Path(folder)) and not self.output.overwrite:
            raise OutputFolderError(
                f"output_dir {folder}: holds checkpoints of an earlier run; "
                "give --resume_from_checkpoint latest, another folder, or --overwrite to begin anew"
            )
        return claim

    def _is_own(self, folder: Path) -> bool:
        """Whether the result in a folder is that of an earlier part of this run, by its record alone."""
        try:
            record = load_record(folder)
        except ValueError:
            return False
        resolved = "mixed_precision"  # None here means the launcher's setting
        identity = json.loads(json.dumps(self.identity))
        return all(record.arguments.get(name) == value for name, value in identity.items() if name != resolved)
