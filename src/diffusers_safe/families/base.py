"""What differs between model families, behind one interface.

To add a family, write one file with a subclass of [`ModelFamily`] under `@register_family`, and import it in
`families/__init__.py`; another package names its file in an entry point of the group `diffusers_safe.families`.
Erasing, generating and publishing need nothing else; students and safe or erased pipeline classes do.
`tests/toy_family.py` adds a small transformer with flow matching. Required are `check`, `shape`, `blank_inputs`,
`_encode` and `predict`; all else has defaults.

**Names** (class attributes)

* `pipeline_classes`: the pipelines that are trained. Any other pipeline around the same denoiser (ControlNet, image to
  image) is recognized by `denoiser_name` and `denoiser_class` where that is enough.
* `denoiser_name`, `denoiser_class`: the trained component, `"unet"` or `"transformer"`: also its folder in a
  repository, a value of `--save` and `--to`, and the prefix of its layers in LoRA files.
* `denoiser_parts`: first parts of its parameters' names, by which a file of bare weights is recognized.
* `kohya_prefix`: of its layers in LoRA files of kohya-ss and others, as ComfyUI reads them.
* `text_encoders`, `tokenizers`: components, in pairs. `token_names`: the encoders' keys in files of textual inversion.
* `train_methods`: for names of `TRAIN_METHODS`, the rule that selects parameters by full name and owner module. Leave
  out what the architecture does not have; [`~ModelFamily.rules`] may also leave out what one checkpoint does not have.

**Configs, before weights are read** (class methods)

* [`~ModelFamily.check`]: refuses what cannot be trained, in one line: wrong widths, inputs for other tasks, no
  unconditional prediction, a scheduler of another kind.
* [`~ModelFamily.shape`]: `(C, H, W)` of a latent. Latents are `(B, C, H, W)` throughout the package; a family whose
  denoiser takes packed sequences (FLUX) packs and unpacks within [`~ModelFamily.predict`].
* [`~ModelFamily.blank_inputs`]: arguments of a forward on the meta device, from which FLOPs and memory are counted.
* Defaults: [`~ModelFamily.skeleton`], and [`~ModelFamily.check_components`], for models that are loaded, not trained.

**Prompts (`encoding.py`) and images**

* `_encode`: prompts to a `Conditioning`, named tensors that [`~ModelFamily.predict`] takes; `""` must give what the
  pipeline itself uses as unconditional prompt.
* [`~ModelFamily.with_sizes`]: for models that take the image's size.
* Defaults for one sequence of tokens, `encoder_hidden_states`, which cross-attention reads:
  [`~ModelFamily.sequences`], and [`~ModelFamily.text_projections`], what closed forms edit, as well as
  [`~ModelFamily.pooled_projection`].
* `optional`: text encoders and tokenizers that a pipeline may lack.
* Defaults for an autoencoder `vae` with a Gaussian, `scaling_factor`, `shift_factor`, `latents_mean`, `latents_std`:
  `picture_size`, `encode_pictures`, `draw_latents`.

**Denoising**

* [`~ModelFamily.predict`]: one forward, in the model's own parametrisation.
* `guidance_name`: where a guidance scale is an input of the denoiser, its name in a `Conditioning`. `_encode` sets it
  to 1, no guidance; trajectories set it to their own scale, and predict once per step instead of twice.
* `guidance_scale`: that of images that training generates.
* [`~ModelFamily.set_timesteps`]: the schedule of a trajectory; where a scheduler needs more than the number of steps
  (`mu` or `sigmas` of SD3 and FLUX), it is computed here from the latents' shape. Initial noise is
  `init_noise_sigma * randn`, where the scheduler has one, and inputs go through its `scale_model_input`, if any.
* What is predicted (epsilon, v, or the flow's velocity) is read from the scheduler: `diffusion.noise.prediction_type`.
  Noise, targets and loss weights follow from it.

**Files and other programs**

* [`~ModelFamily.from_original`]: a denoiser's weights from the names of its authors' single-file checkpoints.
* `single_file` and [`~ModelFamily.to_original`]: a whole pipeline as such a checkpoint, if that can be written.
* [`~ModelFamily.kohya_layers`]: names of layers in LoRA files for ComfyUI and A1111, where they are not diffusers' own
  after `kohya_prefix`; [`~ModelFamily.original_layers`]: names that are read in addition.
* [`~ModelFamily.rename_lora`]: older names in LoRA files, if there are any.
* `pooled_name`, [`~ModelFamily.takes_pooled`]: the denoiser's argument for pooled prompt embeddings, which Safe Latent
  Diffusion sets.
* `unsteered`: why Safe Latent Diffusion does not support pipelines around this denoiser, if it does not.
* Smaller students are defined for UNets only (`families/students.py`).
* Optional, outside: a pipeline class that loads erasures (`ErasedPipelineMixin` before the stock class, nothing else).
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading import check_in_memory, dtypes_of, load_model
from ..provenance import fingerprint
from .encoding import Conditioning, PromptEncoding
from .train_methods import TRAIN_METHODS, resolve_train_method


# A component's config, with its class as `_class_name`, by the component's name; None where the pipeline has none.
ComponentConfig = Callable[[str], dict[str, Any] | None]
# Whether a train method selects a parameter: by its full name and the module that owns it.
Rule = Callable[[str, nn.Module], bool]


class ModelFamily(PromptEncoding):
    """A text-to-image pipeline as training sees it: encode a prompt, predict noise, and the shapes in between.

    The module's docstring lists what a new family defines.

    Args:
        pipeline (`DiffusionPipeline`): The whole pipeline; training changes its denoiser in place.
        resolution (`int`, *optional*): Height and width of an image; the model's own if left out.

    Raises:
        `ValueError`: As [`~ModelFamily.check`].
    """

    pipeline_classes: tuple[type[DiffusionPipeline], ...] = ()
    denoiser_name: str
    denoiser_class: type[nn.Module]
    denoiser_parts: tuple[str, ...] = ()
    kohya_prefix: str
    single_file: bool = False
    optional: tuple[str, ...] = ()
    token_names: tuple[str, ...] = ()
    guidance_name: str | None = None
    guidance_scale: float = 7.5
    unsteered: str | None = None
    train_methods: dict[str, Rule] = {}

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None):
        self.check(_loaded_configs(pipeline), resolution)
        for name in self.tokenizers:
            if name not in self.optional and getattr(pipeline, name, None) is None:
                raise ValueError(f"{name}: this pipeline has none; {type(pipeline).__name__} needs one to be trained")
        self.pipeline, self.resolution = pipeline, resolution
        self.text_encoders, self.tokenizers = (
            tuple(name for name in names if getattr(pipeline, name, None) is not None)
            for names in (self.text_encoders, self.tokenizers)
        )

    # --- configs -----------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def check(cls, config: ComponentConfig, resolution: int | None = None) -> None:
        """Checks the configs of a pipeline's components, loaded or not.

        Raises:
            `ValueError`: If training cannot give this model all that it takes, or not at this resolution.
        """

    @classmethod  # noqa: B027
    def check_components(cls, config: ComponentConfig) -> None:
        """Checks the components of any stored pipeline with this denoiser, whether or not it can be trained: values
        with which a class can be built, but not called, and components that do not fit each other.

        Raises:
            `ValueError`: If there are such.
        """

    @classmethod
    def skeleton(cls, config: ComponentConfig) -> nn.Module:
        """The denoiser's structure: on the meta device, without weights."""
        with torch.device("meta"):
            return cls.denoiser_class.from_config(config(cls.denoiser_name))

    @classmethod
    @abstractmethod
    def shape(cls, config: ComponentConfig, resolution: int | None = None) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""

    @classmethod
    @abstractmethod
    def blank_inputs(cls, denoiser: nn.Module, shape: tuple[int, int, int, int], tokens: int) -> dict[str, Any]:
        """Inputs without values for a denoiser on the meta device.

        Args:
            denoiser (`nn.Module`): Its config says what it takes.
            shape (`tuple[int, int, int, int]`): Of the latents, `(B, C, H, W)`.
            tokens (`int`): Length of a prompt.

        Returns:
            `dict`: The arguments of its forward by name; the first is a tensor with batch size B.
        """

    # --- parameters --------------------------------------------------------------------------------------------------

    @classmethod
    def rules(cls, denoiser: nn.Module) -> dict[str, Rule]:
        """The train methods that this denoiser has."""
        return cls.train_methods

    @classmethod
    def select_parameters(cls, denoiser: nn.Module, train_method: str) -> list[str]:
        """The names of the parameters that a train method trains.

        Args:
            denoiser (`nn.Module`): Of this family.
            train_method (`str`): A name or alias of `TRAIN_METHODS`.

        Returns:
            `list[str]`: Names in the order of `denoiser.named_parameters()`; never empty.

        Raises:
            `ValueError`: If the name is unknown, or means nothing in this denoiser.
        """
        name, rules = resolve_train_method(train_method), cls.rules(denoiser)
        described = f"train_method '{train_method}' ({TRAIN_METHODS[name].description})"
        if name not in rules:
            raise ValueError(f"{described}: this model has no such parameters; allowed are {', '.join(rules)}")
        names = _selected(denoiser, rules[name])
        if not names:
            raise ValueError(f"{described}: selects no parameter of {type(denoiser).__name__}")
        return names

    @classmethod
    def text_projections(cls, denoiser: nn.Module) -> list[str]:
        """The weights `(out, width)` of the linear layers that read the token states of a prompt, as
        [`~ModelFamily.text_states`] has them: what closed forms edit. By default keys and values of cross-attention.

        Raises:
            `ValueError`: If the denoiser has none.
        """
        return [name for name in cls.select_parameters(denoiser, "xattn-strict") if name.endswith(".weight")]

    @classmethod
    def pooled_projection(cls, denoiser: nn.Module) -> str | None:
        """The weight `(out, width)` of the linear layer that reads the pooled state of a prompt, in its first columns;
        `None` if there is none."""
        return None

    @classmethod
    def text_values(cls, denoiser: nn.Module) -> list[str]:
        """Those of [`~ModelFamily.text_projections`] that give values, not keys, of attention.

        Raises:
            `ValueError`: If the denoiser has none.
        """
        names = [name for name in cls.text_projections(denoiser) if cls.is_value(name)]
        if not names:
            raise ValueError("this model's denoiser has no values of cross-attention that could be edited")
        return names

    @classmethod
    def is_value(cls, name: str) -> bool:
        """Whether a parameter of [`~ModelFamily.text_projections`] belongs to the values of attention."""
        return "to_v" in name

    @classmethod
    def find_train_method(cls, denoiser: nn.Module, names: Collection[str]) -> str | None:
        """The name of the train method that selects exactly these parameters, if one does."""
        for name, rule in cls.rules(denoiser).items():
            if set(_selected(denoiser, rule)) == set(names):
                return name
        return None

    # --- files and other programs ------------------------------------------------------------------------------------

    @classmethod
    def component_names(cls) -> set[str]:
        """The names of all components that pipelines of this family have."""
        return {name for kind in cls.pipeline_classes for name in kind._get_signature_keys(kind)[0]}

    @classmethod
    def is_denoiser_name(cls, name: str) -> bool:
        """Whether a parameter or module of the denoiser can have this name."""
        return name.split(".")[0] in cls.denoiser_parts

    @classmethod
    def load_denoiser(cls, name_or_path: str, **options) -> nn.Module:
        """The denoiser of a pipeline in fp32, whole: unlike diffusers' own loading this does not fill in what is
        missing.

        Args:
            name_or_path (`str`): Folder or Hub id.
            options: Of `from_pretrained`, such as `subfolder`, by default [`denoiser_name`].

        Raises:
            `ValueError`: If there is none, or its weights are not those of its config.
        """
        options = {"subfolder": cls.denoiser_name, **options}
        return load_model(cls.denoiser_class, name_or_path, torch.float32, **options)

    @classmethod
    def from_original(cls, weights: dict[str, torch.Tensor], denoiser: nn.Module) -> dict[str, torch.Tensor]:
        """The denoiser's weights of a single-file checkpoint, by the names that diffusers has for them.

        Raises:
            `KeyError`, `TypeError` or `AttributeError`: If it is of another architecture.
            `NotImplementedError`: If such checkpoints of this family cannot be read.
        """
        raise NotImplementedError(f"{cls.__name__} reads no single-file checkpoints")

    @classmethod
    def to_original(cls, pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
        """A whole pipeline as its authors' single-file checkpoint; for families with `single_file`.

        Raises:
            `ValueError`: If a part of it has no place there.
        """
        raise NotImplementedError(f"{cls.__name__} writes no single-file checkpoints")

    @classmethod
    def original_layers(cls, denoiser: nn.Module) -> dict[str, str]:
        """The names that its authors have for the denoiser's layers, by diffusers' names; none by default."""
        return {}

    @classmethod
    def kohya_layers(cls, denoiser: nn.Module) -> dict[str, str]:
        """The names of the denoiser's layers in LoRA files for ComfyUI and A1111, by diffusers' names. Layers that
        these programs do not know are left out."""
        return {name: cls.kohya_name(name) for name, _ in denoiser.named_modules()}

    @classmethod
    def kohya_name(cls, layer: str) -> str:
        """The name of a layer in LoRA files of kohya-ss, which have `_` for `.`."""
        return f"{cls.kohya_prefix}{layer.replace('.', '_')}"

    @classmethod
    def kohya_metadata(cls, denoiser: nn.Module) -> dict[str, str]:
        """What kohya-ss writes into a LoRA file about the base model; A1111 lists LoRAs by it."""
        return {}

    @classmethod
    def rename_lora(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a LoRA of the denoiser by peft's names (`lora_A`, `lora_B`), from older names."""
        return tensors

    @classmethod
    def takes_pooled(cls, config: dict[str, Any]) -> bool:
        """Whether a denoiser with this config takes pooled prompt embeddings."""
        return cls.pooled_name is not None

    @classmethod
    def text_parts(cls, pipeline: DiffusionPipeline) -> dict[str, tuple[PreTrainedTokenizerBase, PreTrainedModel]]:
        """The tokenizers and text encoders of a pipeline that learn a token, by the tokenizer's name."""
        pairs = list(zip(cls.tokenizers, cls.text_encoders))[: len(cls.token_names) or 1]
        found = {name: (getattr(pipeline, name, None), getattr(pipeline, encoder, None)) for name, encoder in pairs}
        return {name: parts for name, parts in found.items() if all(part is not None for part in parts)}

    # --- shapes ------------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        return self.shape(_loaded_configs(self.pipeline), self.resolution)

    @property
    def picture_size(self) -> int:
        """Height and width of an image, in pixels.

        Raises:
            `ValueError`: If they are not the same.
        """
        _, height, width = self.latent_shape
        if height != width:
            raise ValueError(f"resolution: must be given; this model's own is not square ({height} x {width} latents)")
        return height * vae_scale_factor(self.pipeline.vae.config)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def with_sizes(
        self, conditioning: Conditioning, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor
    ) -> Conditioning:
        """Encoded prompts for images of these sizes, cropped there; both `(B, 2)`, vertical first. By default the same
        prompts, for models that take no sizes."""
        return conditioning

    # --- images ------------------------------------------------------------------------------------------------------

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The autoencoder and the text encoders, by their names in the pipeline."""
        return {name: getattr(self.pipeline, name) for name in ("vae", *self.text_encoders)}

    @property
    def encoding_identity(self) -> dict[str, str]:
        """What decides how images and prompts are encoded, by name: fingerprints of encoders and tokenizers, and what
        matters of the pipeline's config."""
        tokenizers = {name: _tokenizer_fingerprint(getattr(self.pipeline, name)) for name in self.tokenizers}
        return {**{name: fingerprint(encoder) for name, encoder in self.encoders.items()}, **tokenizers}

    @torch.no_grad()
    def encode_pictures(self, pixel_values: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Encodes images on a device, without gradients; the autoencoder goes back to where it was.

        Args:
            pixel_values (`torch.Tensor`): `(B, 3, height, width)`, in [-1, 1].

        Returns:
            `torch.Tensor`: Mean and log variance of the latents, `(B, 2 * C, H, W)`.
        """
        vae = self.pipeline.vae
        home = vae.device
        vae.to(device)
        moments = vae.encode(pixel_values.to(device, vae.dtype)).latent_dist.parameters
        vae.to(home)
        return moments

    def draw_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Samples latents with these moments, each from its own generator, scaled as the denoiser takes them;
        `(B, C, H, W)`, float32."""
        latents = DiagonalGaussianDistribution(moments.float()).sample(generators)
        vae = self.pipeline.vae.config
        mean, std = vae.get("latents_mean"), vae.get("latents_std")
        if mean is not None and std is not None:  # as SDXL's pipelines read them
            mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
            return (latents - mean) * vae.scaling_factor / std
        if shift := vae.get("shift_factor"):
            latents = latents - shift
        return latents * vae.scaling_factor

    # --- denoising ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """One forward of a denoiser.

        Args:
            denoiser (`nn.Module`): This family's, possibly wrapped (several processes, mixed precision).
            model_input (`torch.Tensor`): `(B, C, H, W)`, noisy latents as the scheduler scales them.
            timesteps (`torch.Tensor`): `(B,)`.
            conditioning (`Conditioning`): From [`~ModelFamily.encode`].

        Returns:
            `torch.Tensor`: `(B, C, H, W)`, in the model's own parametrisation (epsilon, v, flow). Erasure targets are
            affine combinations of predictions at one latent, so they mean the same in each of them.
        """

    @classmethod
    def set_timesteps(
        cls, scheduler: SchedulerMixin, num_inference_steps: int, latent_shape: tuple[int, int, int]
    ) -> None:
        """Sets up a scheduler for a trajectory, as the pipeline does it."""
        scheduler.set_timesteps(num_inference_steps)

    def make_scheduler(self, num_inference_steps: int | None = None) -> SchedulerMixin:
        """A new copy of the pipeline's own scheduler; with a number of steps, set up for a trajectory."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        if num_inference_steps is not None:
            self.set_timesteps(scheduler, num_inference_steps, self.latent_shape)
        return scheduler


def check_present(config: ComponentConfig, names: Collection[str], pipeline_class: type[DiffusionPipeline]) -> None:
    """Checks that a pipeline has these components.

    Raises:
        `ValueError`: If it lacks one.
    """
    for name in names:
        if config(name) is None:
            raise ValueError(f"{name}: this pipeline has none; {pipeline_class.__name__} needs one to be trained")


def check_channels(
    denoiser_name: str, denoiser: dict[str, Any], vae: dict[str, Any], others: str, patch_size: int = 1
) -> None:
    """Checks that a denoiser takes and gives latents, and nothing else.

    Args:
        denoiser_name (`str`): For the message.
        denoiser, vae (`dict`): Configs.
        others (`str`): Models that do not, such as `"a UNet for inpainting"`.
        patch_size (`int`, defaults to 1): The channels are those of packed patches of this height and width.

    Raises:
        `ValueError`: If not.
    """
    channels = vae.get("latent_channels", 4) * patch_size**2
    packed = f" packed in patches of {patch_size} x {patch_size}" if patch_size > 1 else ""
    for name in ("in_channels", "out_channels"):
        if denoiser[name] != channels:
            raise ValueError(
                f"{denoiser_name} {name} {denoiser[name]}: must be {channels}, as latents{packed} have; {others} "
                "cannot be trained"
            )


def vae_scale_factor(vae: dict[str, Any]) -> int:
    """Pixels that a latent's pixel stands for, in each direction; as diffusers' pipelines compute it."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def _selected(denoiser: nn.Module, rule: Rule) -> list[str]:
    modules = dict(denoiser.named_modules())
    return [name for name, _ in denoiser.named_parameters() if rule(name, modules[name.rpartition(".")[0]])]


def _loaded_configs(pipeline: DiffusionPipeline) -> ComponentConfig:
    def config(name: str) -> dict[str, Any] | None:
        component = getattr(pipeline, name, None)
        if component is None:
            return None
        if not hasattr(component, "config"):
            kind = type(component).__name__
            raise ValueError(f"{name}: is a {kind} without a config; put the model itself into the pipeline")
        if isinstance(component, nn.Module):
            check_in_memory(component, name)
            if " and " in (dtypes := dtypes_of(component)):
                raise ValueError(f"{name}: its weights are {dtypes}; give them one dtype: {name}.to(torch.float32)")
        known = component.config if isinstance(component.config, dict) else component.config.to_dict()
        return {**known, "_class_name": type(component).__name__}

    return config


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": tokenizer.pad_token, "truncation": tokenizer.model_max_length}  # else the last call's
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
