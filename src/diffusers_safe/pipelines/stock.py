"""Safe pipeline classes with the signatures of the stock classes that they extend.

diffusers reads the names and types of a pipeline's components from the signature of its `__init__`, and users pass
what they pass to the stock class. So the signatures are taken from there, with the arguments of Safe Latent Diffusion
added.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from diffusers import DiffusionPipeline

from ..formats import stock_class
from .guidance import SAFETY_CONCEPT, SafetyConfig
from .repository import SafePipelineMixin


def with_stock_signatures(cls: type[SafePipelineMixin]) -> type[SafePipelineMixin]:
    """A class decorator that adds `__init__`, `encode_prompt` and `__call__`.

    The class has `_generate(call, arguments)`, which `__call__` hands the stock class's call and all arguments.
    """
    stock = stock_class(cls)
    cls.__init__ = _init(stock)
    cls.encode_prompt = _encode_prompt(stock)
    cls.__call__ = _call(stock, takes_pooled="pooled_prompt_embeds" in inspect.signature(stock.__call__).parameters)
    return cls


def _init(stock: type[DiffusionPipeline]) -> Callable:
    """The stock `__init__` with `safety_concept` as one more argument."""
    signature = _extended(stock.__init__, {"safety_concept": SAFETY_CONCEPT})

    def __init__(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        concept = arguments.pop("safety_concept", SAFETY_CONCEPT)
        stock.__init__(**arguments)
        self.safety_concept = concept

    __init__.__signature__ = signature
    __init__.__annotations__ = {**get_type_hints(stock.__init__), "safety_concept": str}
    return __init__


def _encode_prompt(stock: type[DiffusionPipeline]) -> Callable:
    """The stock `encode_prompt`, whose embeddings carry those of the safety concept, for a pipeline without text
    encoders."""
    signature = inspect.signature(stock.encode_prompt)

    @functools.wraps(stock.encode_prompt)
    def encode_prompt(self, *args, **kwargs):
        encoded = stock.encode_prompt(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        options = {name: given.get(name) for name in ("lora_scale", "clip_skip", "max_sequence_length")}
        self._carry_concept(encoded[0], given.get("device"), options)
        return encoded

    return encode_prompt


def _call(stock: type[DiffusionPipeline], takes_pooled: bool) -> Callable:
    own: dict[str, Any] = {**SafetyConfig.MEDIUM, "safety_concept": None, "safety_prompt_embeds": None}
    signature = _extended(stock.__call__, {**own, **({"safety_pooled_prompt_embeds": None} if takes_pooled else {})})

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        return self._generate(functools.partial(stock.__call__, self), arguments)

    __call__.__signature__ = signature
    __call__.__doc__ = f"""Generates images away from the safety concept.

    Args:
        sld_guidance_scale (`float`, defaults to 1000): With the four below a [`SafetyConfig`]; up to 1, Safe Latent
            Diffusion is off.
        sld_warmup_steps (`int`, defaults to 10): Denoiser calls that are not changed, from the first.
        sld_threshold (`float`, defaults to 0.01): Elements further from the concept than this are left alone.
        sld_momentum_scale (`float`, defaults to 0.3): In [0, 1].
        sld_mom_beta (`float`, defaults to 0.4): In [0, 1).
        safety_concept (`str`, *optional*): Instead of the pipeline's own, for this call.
        safety_prompt_embeds (`torch.Tensor`, *optional*): `(1, tokens, width)`, or one for each image: the concept as
            embeddings. SDXL and SD3 need `safety_pooled_prompt_embeds` with them, `(1, width)`.
        args, kwargs: All other arguments are those of [`~diffusers.{stock.__name__}`].

    Returns:
        [`StableDiffusionSafePipelineOutput`], or the tuple of its values if `return_dict` is `False`.

    Raises:
        `ValueError`: If an argument is out of its range, or concept and embeddings are both given.
    """
    return __call__


def _extended(function: Callable, added: dict[str, Any]) -> inspect.Signature:
    """The function's signature with more parameters, by their defaults, before `**kwargs`."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters[place:place] = [inspect.Parameter(name, kind, default=default) for name, default in added.items()]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
