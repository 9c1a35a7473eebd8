"""FLUX.1-dev: a transformer with flow matching on packed latents, guidance as an input, CLIP (pooled) and T5."""

from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig

from .base import ComponentConfig, Conditioning, Rule, check_channels, check_present, vae_scale_factor
from .flow_matching import PATCH_SIZE, FlowMatchingFamily, dynamic_shift
from .registry import register_family


SAMPLE_SIZE = 128  # the pipeline's default height and width in latents; the transformer's config has none
T5_LENGTH = 512  # the pipeline's default `max_sequence_length`
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def _is_time_or_output(name: str) -> bool:
    """The guidance scale is embedded as the timestep is."""
    embedders = ("time_text_embed.timestep_embedder.", "time_text_embed.guidance_embedder.")
    return name.startswith((*embedders, "norm_out.", "proj_out."))


def _is_text_key_or_value(name: str) -> bool:
    if name.startswith("single_"):
        return ".attn.to_k." in name or ".attn.to_v." in name
    return ".attn.add_k_proj." in name or ".attn.add_v_proj." in name


def _is_image_attention(name: str) -> bool:
    return not name.startswith("single_") and ".attn.to_" in name and ".to_add_out." not in name


@register_family
class FluxFamily(FlowMatchingFamily):
    """FLUX.1-dev and every pipeline of its shape (Black Forest Labs, 2024).

    A `Conditioning` holds `encoder_hidden_states`, `(B, 512, width)`, the tokens of T5; `pooled_projections`,
    `(B, width)`, the pooled state of CLIP; and `guidance`, `(B,)`. `""` is an encoded empty text with its own pooled
    state. Latents are packed, `(B, H / 2 * W / 2, 4 * C)`, within [`~FluxFamily.predict`] only.

    The model is distilled: a guidance scale is one of its inputs, and the pipeline predicts once per step. Predictions
    that are trained, and targets, are made at scale 1, which stands for no guidance, so the rules of the methods mean
    the same as for other models. Trajectories are made at the scale of `--sampling_guidance_scale`. Scripts of ESD for
    FLUX do the same, with 1 and 3.5, the pipeline's default; EraseAnything (arXiv 2412.20413) has 3 for both.

    Text and image attend to each other jointly. In blocks with two streams each has its own layers, and in single
    blocks both share all layers. `xattn` is the attention of all blocks. `xattn-strict` is every layer that computes
    keys and values of text: `add_k_proj` and `add_v_proj`, and in single blocks `to_k` and `to_v`. `selfattn` is the
    image's own layers of attention. The embedding of the guidance scale counts as time embedding. Closed forms edit
    `context_embedder`, which reads the tokens; text edit also edits the layer that reads the pooled state.
    """

    pipeline_classes = (FluxPipeline,)
    denoiser_class = FluxTransformer2DModel
    denoiser_parts = ("x_embedder", "time_text_embed", "context_embedder", "transformer_blocks",
                      "single_transformer_blocks", "norm_out", "proj_out")  # fmt: skip
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    token_names = ("clip_l", "t5")
    guidance_name, guidance_scale = "guidance", 3.5
    unsteered = "its guidance scale is an input of the model, so there is no second prediction that could be steered"
    train_methods: dict[str, Rule] = {
        "xattn": lambda name, _: ".attn." in name,
        "xattn-strict": lambda name, _: _is_text_key_or_value(name),
        "noxattn": lambda name, _: ".attn." not in name and not _is_time_or_output(name),
        "selfattn": lambda name, _: _is_image_attention(name),
        "full": lambda name, _: True,
        "notime": lambda name, _: not _is_time_or_output(name),
        "esd-u": lambda name, module: isinstance(module, nn.Linear) and ".attn." not in name,
    }

    @classmethod
    def check(cls, config: ComponentConfig, resolution: int | None = None) -> None:
        check_present(config, ("transformer", "vae", "scheduler", *cls.text_encoders), cls.pipeline_classes[0])
        transformer, vae = config("transformer"), config("vae")
        if not transformer.get("guidance_embeds"):
            raise ValueError(
                "transformer guidance_embeds False: must be True; FLUX.1-schnell and its like are distilled to a few "
                "steps without guidance and have no unconditional prediction; erase from FLUX.1-dev"
            )
        clip = CLIPTextConfig.from_dict(config("text_encoder")).hidden_size
        for name, width, encoder in (
            ("joint_attention_dim", config("text_encoder_2")["d_model"], "T5"),
            ("pooled_projection_dim", clip, "CLIP"),
        ):
            if transformer[name] != width:
                raise ValueError(f"transformer {name} {transformer[name]}: must be {width}, as {encoder} gives")
        channels = {"out_channels": transformer.get("out_channels") or transformer["in_channels"]}
        others = "a model for inpainting or with image control"
        check_channels("transformer", {**transformer, **channels}, vae, others, PATCH_SIZE)
        if (scheduler := config("scheduler")["_class_name"]) != SCHEDULER:
            raise ValueError(f"scheduler {scheduler}: must be {SCHEDULER}, whose steps the pipeline sets by sigmas")
        step = vae_scale_factor(vae) * PATCH_SIZE
        if resolution is not None and (resolution < step or resolution % step):
            raise ValueError(
                f"resolution {resolution}: must be a multiple of {step}, as this model's autoencoder and packed "
                f"latents need, such as {max(round(resolution / step), 1) * step}"
            )

    @classmethod
    def shape(cls, config: ComponentConfig, resolution: int | None = None) -> tuple[int, int, int]:
        size = SAMPLE_SIZE if resolution is None else resolution // vae_scale_factor(config("vae"))
        return config("transformer")["in_channels"] // PATCH_SIZE**2, size, size

    @classmethod
    def blank_inputs(cls, denoiser: nn.Module, shape: tuple[int, int, int, int], tokens: int) -> dict[str, Any]:
        config, batch_size = denoiser.config, shape[0]
        with torch.device("meta"):
            latents = torch.empty(shape)
            return {
                "hidden_states": _packed(latents),
                "timestep": torch.empty(batch_size),
                "guidance": torch.empty(batch_size),
                "encoder_hidden_states": torch.empty(batch_size, T5_LENGTH, config.joint_attention_dim),
                "pooled_projections": torch.empty(batch_size, config.pooled_projection_dim),
                **_positions(latents, T5_LENGTH),
            }

    @classmethod
    def set_timesteps(cls, scheduler, num_inference_steps: int, latent_shape: tuple[int, int, int]) -> None:
        mu = dynamic_shift(scheduler.config, latent_shape, max_shift=1.15)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)

    def _encode(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        tokens, pooled = self.encode_different(
            prompts, lambda batch: self.pipeline.encode_prompt(batch, device=device)[:2]
        )
        guidance = torch.ones(len(prompts), device=tokens.device)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled, "guidance": guidance}

    @property
    def sequences(self) -> dict[str, slice]:
        return {"tokenizer_2": slice(None)}

    def predict(
        self, denoiser: nn.Module, model_input: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        velocity = denoiser(
            hidden_states=_packed(model_input),
            timestep=timesteps / 1000,
            **conditioning,
            **_positions(model_input, conditioning["encoder_hidden_states"].shape[1]),
            return_dict=False,
        )[0]
        grid = [size // PATCH_SIZE for size in model_input.shape[-2:]]
        return functional.pixel_shuffle(velocity.transpose(1, 2).unflatten(2, grid), PATCH_SIZE)


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents `(B, C, H, W)` as one token for each patch of 2 x 2, `(B, H / 2 * W / 2, 4 * C)`."""
    return functional.pixel_unshuffle(latents, PATCH_SIZE).flatten(2).transpose(1, 2)


def _positions(latents: torch.Tensor, num_tokens: int) -> dict[str, torch.Tensor]:
    """Where tokens are: those of the image by row and column of their patch, `(H / 2 * W / 2, 3)`, those of text
    nowhere, zeros `(num_tokens, 3)`."""
    rows, columns = (torch.arange(size // PATCH_SIZE, device=latents.device) for size in latents.shape[-2:])
    positions = torch.cartesian_prod(rows.new_zeros(1), rows, columns)
    return {"img_ids": positions.float(), "txt_ids": torch.zeros(num_tokens, 3, device=latents.device)}
