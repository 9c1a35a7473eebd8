"""Stable Diffusion 3 and 3.5: a transformer with flow matching, two CLIP text encoders, and T5, optionally."""

from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextConfig

from .base import ComponentConfig, Conditioning, Rule, check_channels, check_present, vae_scale_factor
from .flow_matching import PATCH_SIZE, FlowMatchingFamily, dynamic_shift
from .registry import register_family


T5_LENGTH = 256  # the pipeline's default `max_sequence_length`


def _is_time_or_output(name: str) -> bool:
    return name.startswith(("time_text_embed.timestep_embedder.", "norm_out.", "proj_out."))


@register_family
class StableDiffusion3Family(FlowMatchingFamily):
    """SD3, SD3.5 and every pipeline of their shape (Esser et al., arXiv 2403.03206).

    A `Conditioning` holds `encoder_hidden_states`, `(B, length, width)`, and `pooled_projections`, `(B, width)`. The
    former are the tokens of both CLIP encoders side by side, padded to T5's width, and those of T5, which are zeros in
    a pipeline without it. The latter are the pooled states of both CLIP encoders. `""` is an encoded empty text with
    its own pooled states.

    Text and image attend to each other jointly, so `xattn` is the attention of both and `xattn-strict` the keys and
    values of the text. Closed forms edit the only layers that read text, `context_embedder` and the one for the pooled
    states; what they pose as a problem of keys and values is then solved for these layers.
    """

    pipeline_classes = (StableDiffusion3Pipeline,)
    denoiser_class = SD3Transformer2DModel
    denoiser_parts = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks", "norm_out", "proj_out")
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    optional = ("text_encoder_3", "tokenizer_3")
    token_names = ("clip_l", "clip_g")
    train_methods: dict[str, Rule] = {
        "xattn": lambda name, _: ".attn." in name,
        "xattn-strict": lambda name, _: ".attn.add_k_proj." in name or ".attn.add_v_proj." in name,
        "noxattn": lambda name, _: ".attn." not in name and not _is_time_or_output(name),
        "selfattn": lambda name, _: (".attn.to_" in name and ".to_add_out." not in name) or ".attn2." in name,
        "full": lambda name, _: True,
        "notime": lambda name, _: not _is_time_or_output(name),
        "esd-u": lambda name, module: isinstance(module, (nn.Linear, nn.Conv2d)) and ".attn." not in name,
    }

    @classmethod
    def check(cls, config: ComponentConfig, resolution: int | None = None) -> None:
        check_present(config, ("transformer", "vae", "scheduler", *cls.text_encoders[:2]), cls.pipeline_classes[0])
        transformer, vae, t5 = config("transformer"), config("vae"), config("text_encoder_3")
        clip = [CLIPTextConfig.from_dict(config(name)) for name in cls.text_encoders[:2]]
        width, pooled = sum(one.hidden_size for one in clip), sum(one.projection_dim for one in clip)
        joint = transformer["joint_attention_dim"]
        if joint < width or (t5 is not None and joint != t5["d_model"]):
            wanted = f"{t5['d_model']}, as T5 gives" if t5 is not None else f"at least {width}, as CLIP gives"
            raise ValueError(f"transformer joint_attention_dim {joint}: must be {wanted}")
        if (found := transformer["pooled_projection_dim"]) != pooled:
            raise ValueError(f"transformer pooled_projection_dim {found}: must be {pooled}, as the text encoders give")
        check_channels("transformer", transformer, vae, "a model for inpainting or with image control")
        _check_scheduler(config("scheduler"), transformer["patch_size"])
        step = vae_scale_factor(vae) * transformer["patch_size"]
        most = step * transformer["pos_embed_max_size"]
        if resolution is not None and (resolution < step or resolution % step or resolution > most):
            near = min(max(round(resolution / step), 1) * step, most)
            raise ValueError(
                f"resolution {resolution}: must be a multiple of {step} up to {most}, as this model's autoencoder, "
                f"patches and position embeddings allow, such as {near}"
            )

    @classmethod
    def shape(cls, config: ComponentConfig, resolution: int | None = None) -> tuple[int, int, int]:
        transformer = config("transformer")
        size = transformer["sample_size"] if resolution is None else resolution // vae_scale_factor(config("vae"))
        return transformer["in_channels"], size, size

    @classmethod
    def blank_inputs(cls, denoiser: nn.Module, shape: tuple[int, int, int, int], tokens: int) -> dict[str, Any]:
        config, batch_size = denoiser.config, shape[0]
        return {
            "hidden_states": torch.empty(shape, device="meta"),
            "timestep": torch.empty(batch_size, device="meta"),
            "encoder_hidden_states": torch.empty(
                batch_size, tokens + T5_LENGTH, config.joint_attention_dim, device="meta"
            ),
            "pooled_projections": torch.empty(batch_size, config.pooled_projection_dim, device="meta"),
        }

    @classmethod
    def set_timesteps(cls, scheduler, num_inference_steps: int, latent_shape: tuple[int, int, int]) -> None:
        config, options = scheduler.config, {}
        if config.get("use_dynamic_shifting"):
            options["mu"] = dynamic_shift(config, latent_shape, max_shift=1.16)
        scheduler.set_timesteps(num_inference_steps, **options)

    def _encode(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        encoded = self.encode_different(prompts, lambda batch: self._encode_some(batch, device))
        return dict(zip(("encoder_hidden_states", "pooled_projections"), encoded, strict=True))

    def _encode_some(self, prompts: list[str], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return tokens, pooled

    @property
    def sequences(self) -> dict[str, slice]:
        length = self.pipeline.tokenizer_max_length
        return {
            name: place
            for name, place in (("tokenizer", slice(0, length)), ("tokenizer_3", slice(length, None)))
            if name in self.tokenizers
        }

    def predict(
        self, denoiser: nn.Module, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return denoiser(model_input, timestep=timesteps, return_dict=False, **conditioning)[0]


def _check_scheduler(scheduler: dict[str, Any], patch_size: int) -> None:
    name = scheduler["_class_name"]
    if not name.startswith("FlowMatch"):
        raise ValueError(
            f"scheduler {name}: is not for flow matching, as this model family's latents and predictions are; allowed "
            "are FlowMatchEulerDiscreteScheduler and its like"
        )
    if scheduler.get("use_dynamic_shifting") and patch_size != PATCH_SIZE:
        raise ValueError(f"transformer patch_size {patch_size}: must be {PATCH_SIZE} with dynamic shifting")
