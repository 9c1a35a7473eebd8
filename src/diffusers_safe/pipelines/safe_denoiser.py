"""The denoiser that a pipeline calls while Safe Latent Diffusion is on."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .guidance import SafetyConfig, SafetyState, guide_safely


class SafeDenoiser:
    """Stands in for a pipeline's denoiser during one call of the pipeline.

    The pipeline hands over a batch [u, c] (unconditional, conditional), as classifier-free guidance does. The denoiser
    sees [u, c, f] with the safety concept as f, and the pipeline gets [u, c'] back, see [`guide_safely`]; all the rest
    is the pipeline's own. Nothing is attached to the denoiser itself, so other pipelines may share it, in other
    threads too, and a compiled or offloaded one stays what it is. Every other attribute is the denoiser's.

    Whatever has the batch's size (ControlNet residuals, IP-Adapter embeddings, SDXL's time ids) gets for f what it has
    for c.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Asked at every call whether it guides at all; it may stop
            half-way.
        denoiser (`nn.Module`): The real one.
        conditions (`dict[str, torch.Tensor]`): What stands for the concept, by the name of the denoiser's argument (or
            of its entry in `added_cond_kwargs`): `(1, ...)`, or `(B, ...)` for B images.
        config ([`SafetyConfig`]): How strongly.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoiser: nn.Module,
        conditions: dict[str, torch.Tensor],
        config: SafetyConfig,
    ):
        self._pipeline, self._denoiser, self._conditions, self._config = pipeline, denoiser, conditions, config
        self._state = SafetyState()
        self.calls = 0

    @property
    def changed_calls(self) -> int:
        """In how many calls so far the prediction was changed."""
        return max(0, self._state.step - self._config.sld_warmup_steps)

    @property
    def guided_calls(self) -> int:
        """How many calls so far came with classifier-free guidance."""
        return self._state.step

    @property
    def _has_more_branches(self) -> bool:
        """Whether the pipeline says that its batch is more than [u, c]: perturbed attention, edits."""
        return bool(
            getattr(self._pipeline, "do_perturbed_attention_guidance", False)
            or getattr(self._pipeline, "enabled_editing_prompts", 1) > 1
        )

    # diffusers asks components for their class: whether LoRA goes in, whether they count for the device.
    __class__ = property(lambda self: type(self._denoiser))

    def __getattr__(self, name: str) -> Any:
        if name == "_denoiser":  # not there yet, while it is being copied
            raise AttributeError(name)
        return getattr(self._denoiser, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if not self._pipeline.do_classifier_free_guidance:
            return self._denoiser(*args, **kwargs)
        if kwargs.get("skip_layers") is not None:
            raise ValueError("skip_guidance_layers: Safe Latent Diffusion does not go with it; leave one of them out")
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        count = len(sample) // 2
        is_pair = len(sample) == 2 * count and (self._state.step > 0 or sample[:count].equal(sample[count:]))
        if not is_pair or self._has_more_branches:
            raise ValueError(
                f"{type(self._pipeline).__name__} does not predict with and without the prompt in one batch of two:"
                " Safe Latent Diffusion cannot steer it"
            )
        if not self._config.needs_concept(self._state.step):
            self._state = SafetyState(self._state.step + 1)
            return self._denoiser(*args, **kwargs)

        used = set()
        args = [self._widen(value, count, used) for value in args]
        kwargs = {name: self._widen(value, count, used, name) for name, value in kwargs.items()}
        if unused := sorted(self._conditions.keys() - used):
            raise ValueError(
                f"{type(self._pipeline).__name__} does not pass {', '.join(unused)} to its denoiser: Safe Latent"
                " Diffusion cannot steer it"
            )
        output = self._denoiser(*args, **kwargs)
        prediction = output[0]
        uncond, text, safety = prediction.chunk(3)
        text, self._state = guide_safely(uncond, text, safety, self._state, self._config)
        steered = torch.cat([uncond, text])
        return (steered, *output[1:]) if isinstance(output, tuple) else type(output)(steered)

    def _widen(self, value: Any, count: int, used: set[str], name: str | None = None) -> Any:
        """What the denoiser gets for [u, c, f] where the pipeline passed `value` for [u, c]; notes in `used` which of
        the conditions went in."""
        if isinstance(value, dict):
            return {key: self._widen(entry, count, used, key) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._widen(entry, count, used) for entry in value)
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != 2 * count:
            return value
        if name == "ip_adapter_masks":  # one for each adapter, not for each image
            return value
        if name not in self._conditions:
            return torch.cat([value, value[count:]])
        used.add(name)
        condition = self._conditions[name].to(value)
        if len(condition) == 1:
            condition = condition.expand(count, *condition.shape[1:])
        if condition.shape != value[count:].shape:
            raise ValueError(
                f"the safety concept's {name} has shape {tuple(condition.shape)}, the prompt's"
                f" {tuple(value[count:].shape)}: pass safety_prompt_embeds of the same shape"
            )
        return torch.cat([value, condition])
