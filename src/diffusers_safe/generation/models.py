"""What generates images: a model, and the ways in which its generation is steered.

model = SteeredModel("safe", "path/or/hub-id", safety="max", safety_concept="a weapon")
pipeline, settings = model.load(GenerationSettings(num_inference_steps=50))
generate(pipeline, rows, "runs/safe", settings)
"""

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, SemanticStableDiffusionPipeline
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer

from .. import pipelines
from ..arguments import typed
from ..concepts import read_concepts
from ..embedded import check_revision
from ..families import check_files, family_around, own_pipelines
from ..formats import LORA_NAME, fetch
from ..formats.read import only_weight_file, read_lora
from ..loading import load_pipeline
from ..model_errors import ModelError, naming, reason
from ..model_files import read_index
from ..pipelines.guidance import SAFETY_CONCEPT, SAFETY_CONFIGS, SafetyConfig
from ..pipelines.safe_latent_diffusion import SafeLatentDiffusionMixin, check_concept
from ..values import choose
from .generate import GenerationSettings
from .processes import launched_processes


_EDITED = ("StableDiffusionPipeline", "SemanticStableDiffusionPipeline")  # by semantic guidance
SETTINGS = GenerationSettings()
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@typed
@dataclass(frozen=True)
class SteeredModel:
    """A model and its ways of steering, as a command line names them.

    Attributes:
        name (`str`): What tables and folders call it.
        model (`str`): Folder or Hub id of a diffusers pipeline.
        safety (`str`, *optional*): Steer with Safe Latent Diffusion: a name of `SAFETY_CONFIGS`. Default: not;
            `"medium"` if the model is a safe pipeline.
        safety_concept (`str`, *optional*): What SLD steers away from; default the pipeline's own, or the paper's list.
        negative_prompt (`str`, *optional*): Stands in for the empty prompt of classifier-free guidance.
        lora (`str`, *optional*): File, folder or Hub id of a LoRA, which is fused into the weights.
        lora_scale (`float`, defaults to 1.0): How much of the LoRA.
        editing_prompt (`list[str]`): Concepts that semantic guidance (SEGA, Brack et al., arXiv 2301.12247) steers
            away from; none by default.
        edit_guidance_scale (`float`, defaults to 5.0): How strongly SEGA steers.
        edit_warmup_steps (`int`, defaults to 10): Steps in which SEGA changes nothing.
        edit_threshold (`float`, defaults to 0.9): The share of the elements that SEGA leaves alone, in [0, 1].
        revision (`str`, *optional*): Of the model on the Hub.
        variant (`str`, *optional*): Of the weight files, such as `"fp16"`.
        dtype (`str`, defaults to `"float32"`): Of the weights: a name of `DTYPES`.

    Raises:
        `ValueError`: If a value is out of its range or two do not go together.
    """

    name: str
    model: str
    safety: str | None = None
    safety_concept: str | None = None
    negative_prompt: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    editing_prompt: list[str] = field(default_factory=list)
    edit_guidance_scale: float = 5.0
    edit_warmup_steps: int = 10
    edit_threshold: float = 0.9
    revision: str | None = None
    variant: str | None = None
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "dtype", choose("dtype", self.dtype, DTYPES))
        if self.safety is not None:
            object.__setattr__(self, "safety", choose("safety", self.safety, SAFETY_CONFIGS))
        elif self.safety_concept is not None:
            raise ValueError(f"safety_concept needs --safety: {', '.join(SAFETY_CONFIGS)}")
        if self.safety_concept is not None:
            check_concept(self.safety_concept)
        if self.lora is None and self.lora_scale != 1:
            raise ValueError(f"lora_scale {self.lora_scale}: needs --lora")
        self._check_editing()

    def _check_editing(self) -> None:
        defaults = {"edit_guidance_scale": 5.0, "edit_warmup_steps": 10, "edit_threshold": 0.9}
        if not self.editing_prompt:
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise ValueError(f"{name} {getattr(self, name)}: needs --editing_prompt")
        else:
            object.__setattr__(self, "editing_prompt", read_concepts(self.editing_prompt, "editing_prompt"))
        if self.editing_prompt and self.safety is not None:
            raise ValueError(f"editing_prompt and safety {self.safety}: one pipeline steers in one of these ways only")
        for name, fits, allowed in (
            ("edit_guidance_scale", self.edit_guidance_scale > 0, "above 0"),
            ("edit_warmup_steps", self.edit_warmup_steps >= 0, "at least 0"),
            ("edit_threshold", 0 <= self.edit_threshold <= 1, "in [0, 1]"),
        ):
            if not fits:
                raise ValueError(f"{name} {getattr(self, name)}: must be {allowed}")

    def check_steering(self, settings: GenerationSettings, guidance_scales: Iterable[float] = ()) -> None:
        """Whether the steering can do anything under these settings.

        Args:
            settings (`GenerationSettings`): How images are sampled.
            guidance_scales (`Iterable[float]`, *optional*): Of rows that have their own.

        Raises:
            `ValueError`: If its warm-up is not shorter than the sampling, or there is no classifier-free guidance.
        """
        ways = []
        if self.safety is not None:
            ways.append((f"--safety {self.safety}", SafetyConfig.named(self.safety).sld_warmup_steps))
        if self.editing_prompt:
            ways.append(("--editing_prompt", self.edit_warmup_steps))
        if self.negative_prompt is not None:
            ways.append(("--negative_prompt", 0))
        for way, warmup in ways:
            if warmup >= settings.num_inference_steps:
                raise ValueError(
                    f"num_inference_steps {settings.num_inference_steps}: {way} changes nothing in its first {warmup}"
                    " steps; give more"
                )
            for scale in (settings.guidance_scale, *guidance_scales):
                if scale <= 1:
                    raise ValueError(f"guidance_scale {scale}: with {way} it must be above 1")

    def check(self) -> None:
        """Looks at the model's index and for the LoRA, before any weights are read.

        Raises:
            `ValueError`: If there is no pipeline or LoRA, or one of a class that cannot be steered so.
        """
        check_revision(self.revision, self.model)
        pipeline_class(self.model, self.revision)
        if self.editing_prompt and (found := _class_name(self.model, self.revision)) not in _EDITED:
            raise ValueError(f"editing_prompt: works with {' and '.join(_EDITED)}; {self.model} is a {found}")
        if self.lora is not None:
            lora_file(self.lora)
        check_files(self.model, f"model '{self.model}'", self.variant)

    def load(
        self, settings: GenerationSettings = SETTINGS, device: torch.device | str | None = None
    ) -> tuple[DiffusionPipeline, GenerationSettings]:
        """Loads the pipeline, and says how it is called.

        Args:
            settings (`GenerationSettings`, *optional*): How to sample.
            device (`torch.device` or `str`, *optional*): Where the pipeline goes; default this process's own.

        Returns:
            `tuple`: The pipeline, and the settings with what the steering adds: `negative_prompt` and `call`.

        Raises:
            `ValueError`: As [`~SteeredModel.check`], or if the LoRA does not fit the model.
        """
        self.check()
        dtype = DTYPES[self.dtype]
        pipeline = load_any_pipeline(
            self.model, torch.float32 if self.lora else dtype, revision=self.revision, variant=self.variant
        )
        if self.lora is not None:
            fuse_lora(pipeline, lora_file(self.lora), self.lora_scale)
            for component in pipeline.components.values():  # after weights and LoRA have met in fp32
                if isinstance(component, torch.nn.Module):
                    torch.nn.Module.to(component, dtype)
        if settings.height is None and (family := family_around(pipeline)) is not None:
            name = family.denoiser_name
            if getattr(pipeline, name).config.get("sample_size", 0) is None:
                why = f"{name}: config.json has no sample_size; give --height and --width"
                raise ModelError(f"model '{self.model}': {why}")
        pipeline, call = self._steer(pipeline)
        pipeline.to(launched_processes().device if device is None else device)
        negative_prompt = settings.negative_prompt if self.negative_prompt is None else self.negative_prompt
        return pipeline, replace(settings, negative_prompt=negative_prompt, call={**settings.call, **call})

    def _steer(self, pipeline: DiffusionPipeline) -> tuple[DiffusionPipeline, dict]:
        if self.editing_prompt:
            return _with_semantic_guidance(pipeline), {
                "editing_prompt": list(self.editing_prompt),
                "reverse_editing_direction": True,
                "edit_guidance_scale": self.edit_guidance_scale,
                "edit_warmup_steps": self.edit_warmup_steps,
                "edit_threshold": self.edit_threshold,
            }
        return pipeline, safety_call(pipeline, self.safety, self.safety_concept)


def pipeline_class(model: str, revision: str | None = None) -> type[DiffusionPipeline]:
    """The class that loads a model, by its index: one of this package or of a family, or diffusers' loader of
    its own classes.

    Raises:
        `ValueError`: If there is no pipeline, or its class is neither ours nor one of diffusers.
    """
    name = _class_name(model, revision)
    if name in pipelines.__all__:
        return getattr(pipelines, name)
    if name in own_pipelines():
        return own_pipelines()[name]
    if not hasattr(diffusers, str(name)):
        raise ValueError(f"model '{model}': its pipeline class '{name}' is none of diffusers {diffusers.__version__}")
    return DiffusionPipeline


def _class_name(model: str, revision: str | None) -> str:
    if model.count("/") > 1 and not os.path.exists(model):  # no Hub id has more than one
        raise ValueError(f"model '{model}': no such folder")
    name = read_index(model, f"model '{model}'", revision=revision)["_class_name"]
    return name[-1] if isinstance(name, list) else name


def load_any_pipeline(
    model: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
) -> DiffusionPipeline:
    """A pipeline of whatever class the model names; a safe one of ours, too.

    Raises:
        `ValueError`: As [`pipeline_class`].
    """
    kind, given = pipeline_class(model, revision), {"revision": revision, "variant": variant}
    given = {name: value for name, value in given.items() if value is not None}
    return load_pipeline(model, f"model '{model}'", kind, dtype=dtype, **given)


def safety_call(pipeline: DiffusionPipeline, safety: str | None, concept: str | None) -> dict:
    """Arguments of a call with SLD, which is given to a stock pipeline if `safety` asks for it; `{}` without."""
    if not isinstance(pipeline, SafeLatentDiffusionMixin):
        if safety is None:
            return {}
        pipelines.enable_safe_latent_diffusion(pipeline)
    own = getattr(pipeline, "safety_concept", SAFETY_CONCEPT)
    return {**SafetyConfig.named(safety or "medium"), "safety_concept": own if concept is None else concept}


def _with_semantic_guidance(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    if isinstance(pipeline, SemanticStableDiffusionPipeline):
        return pipeline
    names = inspect.signature(SemanticStableDiffusionPipeline.__init__).parameters
    parts = {name: component for name, component in pipeline.components.items() if name in names}
    return SemanticStableDiffusionPipeline(**parts, requires_safety_checker=parts["safety_checker"] is not None)


def lora_file(source: str) -> Path:
    """The local file of a LoRA: itself, that of a folder, or that of a Hub repository.

    Raises:
        `ValueError`: If there is none, or several of other names than diffusers' own.
    """
    path = fetch(source)
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
        path = path / (LORA_NAME if LORA_NAME in names else only_weight_file(names, source))
    try:
        read_lora(path)
    except ValueError as error:
        raise ModelError(f"lora {error}") from None
    return path


def fuse_lora(pipeline: DiffusionPipeline, file: Path, scale: float) -> None:
    """Adds a LoRA to a pipeline's weights, `W + scale * (alpha / rank) B A`; no adapters are left.

    Raises:
        `ValueError`: If the pipeline takes no LoRA, or the file holds none, or one that does not fit.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"lora {file}: {type(pipeline).__name__} takes none")
    try:
        tensors, renamed = read_lora(file)
        # diffusers reads a file itself for the metadata that it holds.
        source, found = (tensors, {}) if renamed else (file.parent, {"weight_name": file.name})
        tensors = pipeline.lora_state_dict(dict(tensors) if renamed else source, **found)
        tensors = tensors[0] if isinstance(tensors, tuple) else tensors
        held = sum(name.endswith(("lora_A.weight", "down.weight")) for name in tensors)
        if not held:
            raise ValueError("holds no pair of matrices")
        with _diffusers_in_silence():  # what it warns of is an error below
            pipeline.load_lora_weights(source, **found)
    except Exception as error:  # diffusers and peft raise errors of many types
        why = " ".join(reason(error).split("\n\t")[:2])
        raise ModelError(f"lora {file}: does not fit {type(pipeline).__name__} ({why})") from error
    names = [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is not None]
    fitting = {
        name: sum(isinstance(layer, BaseTunerLayer) for layer in getattr(pipeline, name).modules()) for name in names
    }
    if lost := held - sum(fitting.values()):
        raise ModelError(f"lora {file}: {lost} of its {held} layers have no place in {type(pipeline).__name__}")
    with naming(f"lora {file}: lora_scale {scale:g}"):
        pipeline.fuse_lora([name for name in names if fitting[name]], lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()


@contextmanager
def _diffusers_in_silence() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
