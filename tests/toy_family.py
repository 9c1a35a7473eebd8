"""A model family that the package does not know: a transformer with flow matching, of diffusers' own classes.

It is like Stable Diffusion 3 in what differs from the UNets: joint attention instead of cross-attention, pooled
embeddings as an argument of their own, a scheduler that is set up with `mu`, an autoencoder with a shift.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_safe.emoji.architecture import MAX_TOKENS, build_tokenizer
from diffusers_safe.families import ModelFamily, register_family, registry
from diffusers_safe.families.base import vae_scale_factor
from diffusers_safe.pipelines.erased import ErasedPipelineMixin


WIDTH = 32


class ToyPipeline(DiffusionPipeline, SanaLoraLoaderMixin, TextualInversionLoaderMixin):
    """Plain text to image, with classifier-free guidance in one batch."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae_scale_factor(vae.config))
        self._guidance_scale = 1.0

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    def encode_prompt(self, prompt, device=None, do_classifier_free_guidance=True, negative_prompt=None):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        embeds, pooled = self._embed(prompts, device)
        if not do_classifier_free_guidance:
            return embeds, None, pooled, None
        negative, pooled_negative = self._embed(negative_prompt or [""] * len(prompts), device)
        return embeds, negative, pooled, pooled_negative

    def _embed(self, prompts, device):
        prompts = self.maybe_convert_prompt(prompts, self.tokenizer)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = self.text_encoder(tokens.to(device or self.device))
        return output.last_hidden_state, output.pooler_output

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        num_inference_steps=4,
        guidance_scale=3.0,
        negative_prompt=None,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        self._guidance_scale = guidance_scale
        prompts = [prompt] if isinstance(prompt, str) else prompt
        embeds, negative, pooled, pooled_negative = self.encode_prompt(
            prompts, self.device, self.do_classifier_free_guidance, negative_prompt
        )
        if self.do_classifier_free_guidance:
            embeds, pooled = torch.cat([negative, embeds]), torch.cat([pooled_negative, pooled])
        size = self.transformer.config.sample_size
        if latents is None:
            shape = (len(prompts), self.transformer.config.in_channels, size, size)
            latents = randn_tensor(shape, generator, self.device, self.transformer.dtype)
        self.scheduler.set_timesteps(num_inference_steps, mu=shift_of(latents.shape))
        for t in self.scheduler.timesteps:
            both = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
            prediction = self.transformer(
                hidden_states=both,
                timestep=t.expand(len(both)),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            if self.do_classifier_free_guidance:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]
        images = latents
        if output_type != "latent":
            images = self.vae.decode(latents / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample
            images = self.image_processor.postprocess(images, output_type=output_type)
        return SimpleNamespace(images=images) if return_dict else (images,)


def shift_of(shape) -> float:
    """More noise for larger images, as SD3 and FLUX have it."""
    return float(np.log(1 + shape[-1] * shape[-2] / 64))


class ErasedToyPipeline(ErasedPipelineMixin, ToyPipeline):
    pass


class ToyFamily(ModelFamily):
    pipeline_classes = (ToyPipeline,)
    denoiser_name, denoiser_class = "transformer", SD3Transformer2DModel
    denoiser_parts = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks", "norm_out", "proj_out")
    kohya_prefix = "lora_toy_"
    text_encoders, tokenizers = ("text_encoder",), ("tokenizer",)
    pooled_name = "pooled_projections"
    train_methods = {
        "xattn": lambda name, _: ".attn.add_" in name or ".attn.to_add_out" in name,  # the prompt's side
        "selfattn": lambda name, _: ".attn.to_" in name and ".to_add_out" not in name,
        "full": lambda name, _: True,
    }

    @classmethod
    def check(cls, config, resolution=None):
        size = vae_scale_factor(config("vae")) * config("transformer")["sample_size"]
        if resolution not in (None, size):
            raise ValueError(f"resolution {resolution}: must be {size}")

    @classmethod
    def shape(cls, config, resolution=None):
        size = config("transformer")["sample_size"]
        return config("transformer")["in_channels"], size, size

    @classmethod
    def blank_inputs(cls, denoiser, shape, tokens):
        config, batch_size = denoiser.config, shape[0]
        return {
            "hidden_states": torch.empty(shape, device="meta"),
            "encoder_hidden_states": torch.empty(batch_size, tokens, config.joint_attention_dim, device="meta"),
            "pooled_projections": torch.empty(batch_size, config.pooled_projection_dim, device="meta"),
            "timestep": torch.empty(batch_size, device="meta"),
        }

    @classmethod
    def set_timesteps(cls, scheduler, num_inference_steps, latent_shape):
        scheduler.set_timesteps(num_inference_steps, mu=shift_of(latent_shape))

    def _encode(self, prompts, device):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(prompts, device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, denoiser, model_input, timesteps, conditioning):
        return denoiser(hidden_states=model_input, timestep=timesteps, return_dict=False, **conditioning)[0]


@contextmanager
def registered():
    """While it lasts, the package knows the family."""
    with pytest.MonkeyPatch.context() as patch:
        known = registry.families()
        patch.setattr(registry, "_registered", [])
        register_family(ToyFamily)  # first: Stable Diffusion 3 has denoisers of the same class
        registry._registered.extend(known)
        yield ToyFamily


def build_toy_pipeline(seed: int = 0) -> ToyPipeline:
    """Latents 4 x 8 x 8, images of 16 x 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            sample_size=16,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=1.5,
            shift_factor=0.1,
        )
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=8,
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = ToyPipeline(vae.eval(), text_encoder.eval(), tokenizer, transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
