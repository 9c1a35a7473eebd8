"""Safe Latent Diffusion around a pipeline's own `__call__`, and the way to give it to any pipeline."""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..arguments import typed
from ..families import ModelFamily, families, family_around
from ..images import to_8_bits, to_rgb
from .guidance import SAFETY_CONCEPT, SafetyConfig
from .safe_denoiser import SafeDenoiser


_NO_GUIDANCE = "its denoiser takes the guidance scale as an input, there is no guidance to change"
# Pipelines of diffusers that have all that is asked for below, and still cannot be steered: why.
_REFUSED = {
    "StableDiffusionPanoramaPipeline": "it calls its denoiser for each view, and warm-up and momentum count steps",
    "LatentConsistencyModelPipeline": _NO_GUIDANCE,
    "LatentConsistencyModelImg2ImgPipeline": _NO_GUIDANCE,
    "LEditsPPPipelineStableDiffusionXL": "its guidance is that of edits, not of a prompt",
}
_TEXT_PARTS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}


class SafeLatentDiffusionMixin:
    """Steers the calls of a diffusers pipeline class; to be named before it among the bases."""

    def _call_safely(
        self,
        call: Callable,
        arguments: dict[str, Any],
        config: SafetyConfig,
        safety_concept: str,
        safety_prompt_embeds: torch.Tensor | None = None,
        safety_pooled_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[Any, str | None]:
        """Runs the stock pipeline's `call(**arguments)` with SLD.

        Returns:
            `tuple`: What `call` returned, and the concept that was applied: `None` if nothing was changed, `""` if it
            was given as embeddings.
        """
        arguments = {name: _readable_picture(name, value) for name, value in arguments.items()}
        if config.is_off:
            _warn(f"Safe Latent Diffusion is off: sld_guidance_scale {config.sld_guidance_scale} is not above 1")
            return call(**arguments), None
        self._check_call(arguments)

        if safety_prompt_embeds is not None:
            conditions = self._name_conditions(safety_prompt_embeds, safety_pooled_prompt_embeds)
            applied = ""
        else:
            conditions = self._concept_conditions(safety_concept, arguments)
            applied = safety_concept
        with self._steered(conditions, config) as denoiser:
            output = call(**arguments)
        if denoiser.changed_calls:
            return output, applied
        parameter = inspect.signature(call).parameters.get("guidance_scale")
        scale = arguments.get("guidance_scale", None if parameter is None else parameter.default)
        if denoiser.guided_calls:
            reason = f"its warm-up of {config.sld_warmup_steps} is not shorter than the {denoiser.guided_calls} steps"
        elif not denoiser.calls:
            reason = "the denoiser was not called"
        elif isinstance(scale, (int, float)) and scale > 1:
            raise ValueError(
                f"{type(self).__name__} says that it does not guide (do_classifier_free_guidance), though"
                f" guidance_scale is {scale}: it computes guidance in a way that Safe Latent Diffusion cannot steer"
            )
        else:
            reason = "classifier-free guidance was off (see guidance_scale)"
        _warn(f"Safe Latent Diffusion changed nothing: {reason}")
        return output, None

    def _check_call(self, arguments: dict[str, Any]) -> None:
        """
        Raises:
            `ValueError`: If a call would fail inside diffusers: without VAE, or in two dtypes.
        """
        if getattr(self, "vae", True) is None and arguments.get("output_type") != "latent":
            raise ValueError(f"{type(self).__name__} has no vae: pass output_type='latent', or give it one")
        name, encoders = self._denoiser_family.denoiser_name, _text_encoders(self)
        if not encoders or "prompt_embeds" in arguments or torch.is_autocast_enabled(self.device.type):
            return
        denoiser, encoder = _real(getattr(self, name)), encoders[-1]  # whose dtype the embeddings have
        theirs = getattr(self, encoder).dtype
        if denoiser is not None and theirs != denoiser.dtype and not hasattr(denoiser, "hf_quantizer"):
            raise ValueError(
                f"{type(self).__name__}: {name} is in {denoiser.dtype}, {encoder} in {theirs}: move the whole pipeline"
                " to one dtype, or call it under torch.autocast"
            )

    @contextmanager
    def _steered(self, conditions: dict[str, torch.Tensor], config: SafetyConfig) -> Iterator[SafeDenoiser]:
        """While it lasts, the pipeline calls a [`SafeDenoiser`]."""
        name = self._denoiser_family.denoiser_name
        real = getattr(self, name)
        if type(real) is SafeDenoiser:
            raise RuntimeError(
                f"this {type(self).__name__} is generating already; use a separate pipeline for each call"
            )
        # Past `DiffusionPipeline.__setattr__`, which is for components that are to stay.
        self.__dict__[name] = denoiser = SafeDenoiser(self, real, conditions, config)
        try:
            yield denoiser
        finally:
            if self.__dict__[name] is denoiser:  # else another one was put in its place
                self.__dict__[name] = real

    @property
    def _denoiser_family(self) -> type[ModelFamily]:
        """The family of the denoiser; where the pipeline was loaded without one, by the name of the component."""
        by_name = (family for family in families() if hasattr(self, family.denoiser_name))
        return family_around(self) or next(by_name)

    @property
    def components(self) -> dict[str, Any]:
        # What moves and offloads models during a call must see the real denoiser.
        _warn_of_from_pipe(self)
        return {name: _real(component) for name, component in super().components.items()}

    @property
    def _has_text_encoder(self) -> bool:
        return bool(_text_encoders(self))

    def _concept_conditions(self, concept: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The denoiser's conditions for a concept, encoded as the call encodes its prompt."""
        if not self._has_text_encoder:
            carried = getattr(arguments.get("prompt_embeds"), "safety_conditions", {})
            if concept not in carried:
                raise ValueError("there is no text encoder for the safety concept: pass safety_prompt_embeds")
            return carried[concept]
        attention = arguments.get("cross_attention_kwargs") or arguments.get("joint_attention_kwargs") or {}
        given = {name: arguments.get(name) for name in ("clip_skip", "max_sequence_length")}
        return self._encode_concept(concept, self._execution_device, lora_scale=attention.get("scale"), **given)

    def _carry_concept(
        self, prompt_embeds: torch.Tensor, device: torch.device | None, options: dict[str, Any]
    ) -> None:
        """Notes the encoded concept on prompt embeddings that a pipeline without text encoder may be called with."""
        if self._has_text_encoder and type(getattr(self, self._denoiser_family.denoiser_name)) is not SafeDenoiser:
            conditions = self._encode_concept(self.safety_concept, device, **options)
            prompt_embeds.safety_conditions = {self.safety_concept: conditions}

    def _encode_concept(self, concept: str, device: torch.device | None, **options: Any) -> dict[str, torch.Tensor]:
        """Options that are `None`, or that the pipeline's `encode_prompt` does not take, are left out."""
        encode_prompt = super().encode_prompt
        known = inspect.signature(encode_prompt).parameters
        options = {name: value for name, value in options.items() if name in known and value is not None}
        options |= {name: None for name in ("prompt_2", "prompt_3") if name in known}  # as the first
        guidance = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        options |= {name: value for name, value in guidance.items() if name in known}
        encoded = encode_prompt(concept, device=device, **options)
        return self._name_conditions(encoded[0], encoded[2] if len(encoded) == 4 else None)

    def _name_conditions(self, embeds: torch.Tensor, pooled: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """By the names under which the denoiser takes them."""
        family = self._denoiser_family
        denoiser = getattr(self, family.denoiser_name)
        takes_pooled = pooled is not None if denoiser is None else family.takes_pooled(denoiser.config)
        if takes_pooled != (pooled is not None):
            verb = "needs" if takes_pooled else "takes no"
            raise ValueError(f"{type(self).__name__} {verb} safety_pooled_prompt_embeds with safety_prompt_embeds")
        return {"encoder_hidden_states": embeds, **({family.pooled_name: pooled} if takes_pooled else {})}


@typed
def enable_safe_latent_diffusion(
    pipeline: DiffusionPipeline,
    safety_concept: str = SAFETY_CONCEPT,
    config: Mapping[str, float] | str = SafetyConfig.MEDIUM,
) -> DiffusionPipeline:
    """Gives Safe Latent Diffusion to a pipeline, in place: ControlNet, T2I-Adapter, ...

    The pipeline must batch classifier-free guidance: one call of its denoiser predicts with and without the prompt.
    Its calls then also take `safety_concept`, `safety_prompt_embeds` and the `sld_*` values of a [`SafetyConfig`], and
    its outputs have an attribute `applied_safety_concept`.

    What is made from it does not inherit this: `save_pretrained` and `push_to_hub` write the stock pipeline, and
    `from_pipe` returns one, each with a warning. Enable it again there. For Stable Diffusion itself and SDXL there are
    classes that keep it.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Around the denoiser of a supported family: Stable Diffusion 1, 2,
            XL, and what extends them.
        safety_concept (`str`, *optional*): What to steer away from; default the paper's list.
        config ([`SafetyConfig`], `dict` or `str`, *optional*): How strongly, as a config or its name, such as `"max"`;
            default `SafetyConfig.MEDIUM`.

    Returns:
        [`~diffusers.DiffusionPipeline`]: The same object.

    Raises:
        `ValueError`: If the pipeline is no such pipeline, has no scheduler or tokenizer, or steers already, or the
            concept is blank. One that turns out not to batch, or to be in two dtypes, raises it when it is called.
    """
    stock = type(pipeline)
    if isinstance(pipeline, SafeLatentDiffusionMixin):
        raise ValueError(f"{stock.__name__}: Safe Latent Diffusion is enabled already")
    family = family_around(pipeline)
    reasons = [family and family.unsteered, *(_REFUSED.get(base.__name__) for base in stock.__mro__)]
    if why := next(filter(None, reasons), None):
        raise ValueError(f"{stock.__name__}: Safe Latent Diffusion does not support it: {why}")
    lacks = [name for name in ("encode_prompt", "do_classifier_free_guidance") if not hasattr(stock, name)]
    if family is None:
        kinds = dict.fromkeys(
            f"{family.denoiser_name} of the class {family.denoiser_class.__name__}" for family in families()
        )
        lacks.append(" or ".join(kinds))
    if lacks:
        raise ValueError(
            f"{stock.__name__} has no {' and no '.join(lacks)}: Safe Latent Diffusion does not support it"
        )
    _check_parts(pipeline)
    config = SafetyConfig.named(config) if isinstance(config, str) else SafetyConfig(**config)
    pipeline._safety = config, check_concept(safety_concept)
    pipeline.__class__ = _steered_class(stock)
    return pipeline


def _check_parts(pipeline: DiffusionPipeline) -> None:
    needed = [_TEXT_PARTS[name] for name in _text_encoders(pipeline)]
    if lacks := [name for name in ("scheduler", *needed) if getattr(pipeline, name, None) is None]:
        raise ValueError(f"{type(pipeline).__name__} has no {' and no '.join(lacks)}: give it one before its calls")


def disable_safe_latent_diffusion(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Takes back [`enable_safe_latent_diffusion`].

    Returns:
        [`~diffusers.DiffusionPipeline`]: The same object.

    Raises:
        `ValueError`: If it was not enabled.
    """
    if not hasattr(pipeline, "_safety"):
        raise ValueError(f"{type(pipeline).__name__}: Safe Latent Diffusion was not enabled on it")
    del pipeline._safety
    pipeline.__class__ = type(pipeline).__mro__[2]  # itself, the mixin, the stock class
    return pipeline


@functools.cache
def _steered_class(stock: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass that steers, under the same name: that is what `save_pretrained` writes, with a warning."""
    signature = inspect.signature(stock.__call__)

    @functools.wraps(stock.__call__)
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        config, concept = self._safety
        config = SafetyConfig(**{name: kwargs.pop(name, value) for name, value in dict(config).items()})
        own_concept, own_embeds = kwargs.pop("safety_concept", None), kwargs.pop("safety_prompt_embeds", None)
        own_pooled = kwargs.pop("safety_pooled_prompt_embeds", None)
        check_either(own_concept, own_embeds, own_pooled)
        concept = concept if own_concept is None else own_concept
        arguments = signature.bind(self, *args, **kwargs).arguments
        del arguments["self"]
        arguments |= check_known(self, arguments.pop("kwargs", {}))
        call = functools.partial(stock.__call__, self)
        output, applied = self._call_safely(call, arguments, config, concept, own_embeds, own_pooled)
        if not isinstance(output, tuple):
            output.applied_safety_concept = applied
        return output

    @functools.wraps(stock.save_pretrained)
    def save_pretrained(self, *args, **kwargs):  # `push_to_hub` calls it, too
        _warn(
            f"Safe Latent Diffusion of this {stock.__name__} is not saved, the files hold the stock pipeline: call"
            " enable_safe_latent_diffusion after loading it, or use a class that saves it, such as"
            " StableDiffusionPipelineSafe"
        )
        return stock.save_pretrained(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):  # pickle would look for a class of this name, and find the stock one
        return _restore, (stock, self.__dict__)

    attributes = {
        "__call__": __call__,
        "save_pretrained": save_pretrained,
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": __reduce_ex__,
    }
    return type(stock.__name__, (SafeLatentDiffusionMixin, stock), attributes)


def _restore(stock: type[DiffusionPipeline], attributes: dict[str, Any]) -> DiffusionPipeline:
    pipeline = object.__new__(_steered_class(stock))
    pipeline.__dict__.update(attributes)
    return pipeline


def check_known(pipeline: DiffusionPipeline, others: dict[str, Any]) -> dict[str, Any]:
    """Returns what a call was given besides its named arguments.

    Raises:
        `TypeError`: If it is not what the stock pipelines take there, such as a misspelled `sld_*`.
    """
    if unknown := sorted(others.keys() - {"callback", "callback_steps"}):
        raise TypeError(f"{type(pipeline).__name__} got unknown arguments {', '.join(unknown)}")
    return others


def check_concept(concept: str) -> str:
    """Returns a concept as it is.

    Raises:
        `ValueError`: If it is no text or blank.
    """
    if not isinstance(concept, str) or not concept.strip():
        raise ValueError(f"safety_concept {concept!r}: must be a text that is not blank")
    return concept


def check_either(concept: str | None, embeds: torch.Tensor | None, pooled: torch.Tensor | None) -> None:
    """Checks what a call says of its concept.

    Raises:
        `ValueError`: If it is given twice, or only in part.
    """
    if concept is not None:
        check_concept(concept)
        if embeds is not None:
            raise ValueError("pass safety_concept or safety_prompt_embeds, not both")
    if pooled is not None and embeds is None:
        raise ValueError("safety_pooled_prompt_embeds need safety_prompt_embeds too")


def _readable_picture(argument: str, value: Any) -> Any:
    """An argument with its `PIL` images as the pipelines read them without loss: in 8 bits, and in RGB unless it is
    a mask. The pipelines take 16-bit values, and the colours under full transparency, as they are."""
    if isinstance(value, list):
        return [_readable_picture(argument, item) for item in value]
    if not isinstance(value, Image.Image):
        return value
    return to_8_bits(value) if "mask" in argument else to_rgb(value)


def _text_encoders(pipeline: DiffusionPipeline) -> list[str]:
    return [name for name in _TEXT_PARTS if getattr(pipeline, name, None) is not None]


def _real(component: Any) -> Any:
    return component._denoiser if type(component) is SafeDenoiser else component


def _warn_of_from_pipe(pipeline: SafeLatentDiffusionMixin) -> None:
    """Warns where a stock `from_pipe` asks for the components: diffusers has no other hook, and what it makes of them
    does not steer."""
    frame = sys._getframe(2)  # who asked for `components`
    if frame.f_code.co_name != "from_pipe" or not frame.f_globals["__name__"].startswith("diffusers."):
        return
    target = frame.f_locals.get("cls")
    if not (isinstance(target, type) and issubclass(target, SafeLatentDiffusionMixin)):
        name = getattr(target, "__name__", "the new pipeline")
        _warn(
            f"Safe Latent Diffusion of this {type(pipeline).__name__} is not passed on by {name}.from_pipe: call"
            " enable_safe_latent_diffusion on the new pipeline, or use a class of diffusers_safe"
        )


def _warn(message: str) -> None:
    """Warns where the user called the pipeline."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("diffusers_safe", "diffusers", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
