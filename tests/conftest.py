"""Models small enough to build in a blink, of the real classes."""

import copy
import gc
import os
import signal
from functools import cache, partial
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
    # Or torch asks oneDNN for attention in bfloat16, and then says that without AVX-512 it cannot pack its inputs.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# A shell ignores Ctrl-C for what it starts in the background, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffusers_safe.emoji.architecture import MAX_TOKENS, build_scheduler, build_t5_tokenizer, build_tokenizer
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.loop import ErasureLoop
from diffusers_safe.families import make_family
from scripts import accelerate_on_cpu


TESTS = Path(__file__).parent
if os.environ.get("OTHER_MACHINE"):
    import other_machine

    other_machine.install()


def pytest_collection_finish():
    """Collections of garbage, which evaluations and accelerate ask for, pass over what the imports have made: millions
    of objects, 0.8 s each time."""
    gc.freeze()


def build_tiny_pipeline(seed: int = 0, layers_per_block: int = 2) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights, 0.5 M parameters, latents 4 x 8 x 8, pictures of 64 x 64."""
    built = _tiny_pipeline(seed, layers_per_block)
    return copy.deepcopy(built, {id(built.tokenizer): build_tokenizer()})  # a copied tokenizer decodes otherwise


@cache  # a copy takes two thirds of the time, and hundreds are made
def _tiny_pipeline(seed: int, layers_per_block: int) -> StableDiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
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
            sample_size=64,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=layers_per_block,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tiny_sd_2_pipeline(seed: int = 0, layers_per_block: int = 2) -> StableDiffusionPipeline:
    """The same in the shape of SD 2.x: OpenCLIP's activation and another text width, linear projections, heads by
    level, v prediction down to no signal at all."""
    pipeline = build_tiny_pipeline(seed, layers_per_block)
    text_config = {**pipeline.text_encoder.config.to_dict(), "hidden_size": 40, "hidden_act": "gelu"}
    unet_config = {
        **pipeline.unet.config,
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "attention_head_dim": [1, 2, 2, 4],
        "upcast_attention": True,
    }
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        pipeline.register_modules(
            text_encoder=CLIPTextModel(CLIPTextConfig(**text_config)).eval(),
            unet=UNet2DConditionModel.from_config(unet_config).eval(),
            scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, **schedule),
        )
    return pipeline


def _tiny_t5(tokenizer, width: int) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))


def build_tiny_sd3_pipeline(seed: int = 0, t5: bool = True) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3.5 pipeline with random weights: two CLIP encoders of widths 32 and 48 and T5 of width 96,
    dual attention in the first of two blocks; latents 4 x 8 x 8, images of 64 x 64."""
    parts = build_tiny_pipeline(seed)
    parts.vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
    config = {**parts.text_encoder.config.to_dict(), "num_hidden_layers": 2, "projection_dim": 16}
    tokenizer_3 = build_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 3)
        clip = [CLIPTextModelWithProjection(CLIPTextConfig(**{**config, "hidden_size": width})) for width in (32, 48)]
        text_encoder_3 = _tiny_t5(tokenizer_3, 96)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=96,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    return StableDiffusion3Pipeline(
        vae=parts.vae,
        text_encoder=clip[0],
        tokenizer=parts.tokenizer,
        text_encoder_2=clip[1],
        tokenizer_2=build_tokenizer(),
        text_encoder_3=text_encoder_3.eval() if t5 else None,
        tokenizer_3=tokenizer_3 if t5 else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def build_tiny_flux_pipeline(seed: int = 0) -> FluxPipeline:
    """A FLUX.1-dev pipeline with random weights: CLIP of width 32 and T5 of width 48, a block with two streams and a
    single block; latents 4 x 8 x 8 for images of 64 x 64. Its own resolution is 1024 x 1024, as FLUX's."""
    parts = build_tiny_pipeline(seed)
    parts.vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
    tokenizer_2 = build_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 4)
        text_encoder_2 = _tiny_t5(tokenizer_2, 48)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
    return FluxPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def build_tiny_xl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline with random weights: its three levels, its two encoders of different widths (32
    and 48, projected to 24) and tokenizers that pad differently, its scheduler; latents 4 x 8 x 8."""
    parts = build_tiny_pipeline(seed)
    config = {**parts.text_encoder.config.to_dict(), "num_hidden_layers": 2}
    config_2 = {**config, "hidden_size": 48, "projection_dim": 24, "hidden_act": "gelu"}
    tokenizer_2 = build_tokenizer()
    tokenizer_2.pad_token = "!"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        text_encoder = CLIPTextModel(CLIPTextConfig(**config))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**config_2))
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 2, 2),
            use_linear_projection=True,
            cross_attention_dim=32 + 48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
            norm_num_groups=4,
        )
    return StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=parts.tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


@pytest.fixture
def on_cpu():
    with accelerate_on_cpu():
        yield


# Where the number of layers in a block matters, it is SD's. Elsewhere one is enough: most of a tiny model's time goes
# into calling layers.
LIKE_SD = (
    *("distillation/", "test_students.py", "test_distillation_benchmarks.py", "test_cost.py", "test_lora.py"),
    *("test_erased.py", "test_export.py", "test_read.py", "test_loading.py"),
)


@pytest.fixture(scope="module")
def layers_per_block(request) -> int:
    return 2 if any(name in str(request.path.relative_to(TESTS)) for name in LIKE_SD) else 1


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> str:
    """A tiny pipeline with SD's number of layers, of which students are made. Not to be changed."""
    folder = tmp_path_factory.mktemp("teacher")
    build_tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def make_tiny_pipeline(layers_per_block):
    """The function `(seed=0) -> StableDiffusionPipeline`: new each call, the same weights for a seed."""
    return partial(build_tiny_pipeline, layers_per_block=layers_per_block)


@pytest.fixture(scope="module")
def make_tiny_sd_2_pipeline(layers_per_block):
    """The function `(seed=0) -> StableDiffusionPipeline` in the shape of SD 2.x."""
    return partial(build_tiny_sd_2_pipeline, layers_per_block=layers_per_block)


@pytest.fixture(scope="session")
def make_tiny_xl_pipeline():
    """The function `(seed=0) -> StableDiffusionXLPipeline`."""
    return build_tiny_xl_pipeline


@pytest.fixture(scope="session")
def make_tiny_sd3_pipeline():
    """The function `(seed=0, t5=True) -> StableDiffusion3Pipeline`."""
    return build_tiny_sd3_pipeline


@pytest.fixture(scope="session")
def make_tiny_flux_pipeline():
    """The function `(seed=0) -> FluxPipeline`."""
    return build_tiny_flux_pipeline


@pytest.fixture
def tiny_pipeline(make_tiny_pipeline) -> StableDiffusionPipeline:
    """A new tiny pipeline that a test may change."""
    return make_tiny_pipeline()


@pytest.fixture(scope="module")
def tiny_model_folder(tmp_path_factory, make_tiny_pipeline) -> str:
    """A tiny pipeline saved to disk, for code that loads models by path. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tiny_pipeline().save_pretrained(folder)
    return str(folder)


# Tests that start processes take up to a minute: with the longest first, no process waits for another at the end.
LONGEST = ("test_sdd.py", "test_distillation.py", "test_erasure_leaderboard.py", "test_hub.py", "test_repository.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def make_loop(make_tiny_pipeline, tmp_path):
    """The function that makes a loop of a few steps on a tiny model: `folder` in `tmp_path` for its output, the
    name of a method, whose options are those below with `changes`, and its `mixed_precision` and `pipeline`."""

    def make(folder="run", method="sdd", mixed_precision="no", pipeline=None, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = {
            "pretrained_model_name_or_path": "tiny",
            "concepts": ["knife", "gun"],
            "output_dir": str(tmp_path / folder),
            "num_inference_steps": 4,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            **({"ema_decay": 0.5} if method == "sdd" else {}),
            "watch_prompts": ["a cat"],
            "checkpointing_steps": 0,
        }
        options = make_options(method, **{**settings, **changes})
        family = make_family(pipeline or make_tiny_pipeline())
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        return ErasureLoop(accelerator, family, options.method.objective(options.concept.concepts), options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
