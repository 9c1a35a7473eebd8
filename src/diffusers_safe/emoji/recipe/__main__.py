"""Trains the embedded models and their judges from the sprites. On a CPU this takes many hours:

    python -m diffusers_safe.emoji.recipe --output_dir runs/emoji

It made the models that ship, whose cards say what differs. It takes days on a CPU. It can be stopped at any time; the
same command continues from the newest checkpoint.
`--stages` selects stages: once the autoencoder is trained, `decoder`, `unet` and `transformer` may run at the same
time, in a process each, and the judges at any time. `assemble` writes the models of the selected stages, of `unet` and
`transformer` both if neither is selected. Each stage runs in a single process. Do not compile the autoencoder
(docs/architecture.md).
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline

from ...arguments import option, required, typed
from ...command_line import parse_dataclass
from ...formats import written_aside
from ...messages import exit_with_error
from ...output_folders import check_output_dir
from ...provenance import fingerprint
from ..architecture import build_flow_scheduler, build_sampler, build_t5_tokenizer, build_tokenizer
from ..render import ARTWORK
from ..scenes import VARIED, Scene, Variation
from .autoencoder import autoencoder_stage, decoder_stage
from .judges import judge_stage, refresh_batch_norm, second_judge_stage
from .pictures import MORE_SKETCHES, CaptionedLatents, encode_pictures, latent_statistics, load_pictures
from .stage import train_stage
from .transformer import TRANSFORMER_LESSONS, TransformerLoss, transformer_stage
from .unet import UNET_LESSONS, UNetLoss, unet_stage


STAGES = ("judge", "second_judge", "autoencoder", "decoder", "unet", "transformer", "assemble")


@typed
@dataclass
class RecipeArguments:
    output_dir: str = required("Folder for checkpoints, caches and the finished models.")
    stages: list[str] = option(list(STAGES), f"Stages to run: {', '.join(STAGES)}.", STAGES)
    num_pictures: int = option(48000, "Number of images of each kind, which are rendered once.", at_least=1)
    judge_steps: int = option(4000, "Training steps of each judge, with batch size 64.", at_least=1)
    autoencoder_steps: int = option(6000, "Training steps of the autoencoder, with batch size 16.", at_least=1)
    decoder_steps: int = option(
        3000, "Training steps of the decoder on noisy latents, with batch size 16.", at_least=1
    )
    unet_steps: list[int] = option(
        [lesson.steps for lesson in UNET_LESSONS], "Training steps of the UNet in each of its rounds."
    )
    transformer_steps: list[int] = option(
        [lesson.steps for lesson in TRANSFORMER_LESSONS], "Training steps of the transformer in each of its rounds."
    )
    compile_unet: bool = option(
        False, "Compile the UNet: steps are faster on a CPU, after minutes of compilation. Needs a C++ compiler."
    )
    checkpoint_minutes: float = option(5.0, "Minutes between checkpoints.", at_least=0)
    seed: int = option(0, "Seed of images, batches, noise and initial weights.", at_least=0, below=2**32)

    def __post_init__(self):
        for name, lessons in (("unet_steps", UNET_LESSONS), ("transformer_steps", TRANSFORMER_LESSONS)):
            steps = getattr(self, name)
            if len(steps) != len(lessons) or min(steps) < 1:
                raise ValueError(f"{name} {steps}: must be {len(lessons)} numbers, each at least 1")


def main(args: RecipeArguments) -> None:
    def train(stage):
        return train_stage(stage, args.output_dir, args.seed, args.checkpoint_minutes)

    for name, stage, rate, artwork in (
        ("judge", judge_stage, 2e-3, ARTWORK[:1]),
        ("second_judge", second_judge_stage, 1e-3, ARTWORK),
    ):
        if name in args.stages:
            set_seed(args.seed)
            judge = train(stage(args.judge_steps, rate)).classifier
            refresh_batch_norm(judge, artwork, args.seed)
            judge.save_pretrained(Path(args.output_dir) / "judges" / name)
    stages = set(args.stages)
    if "assemble" in stages:
        stages |= {"decoder"} | ({"unet", "transformer"} & stages or {"unet", "transformer"})
    if not {"autoencoder", "decoder", "unet", "transformer"} & stages:
        return
    pictures, _ = load_pictures(args.output_dir, args.num_pictures, args.seed, VARIED)
    set_seed(args.seed)
    autoencoder = train(autoencoder_stage(pictures, args.autoencoder_steps, 1e-3)).autoencoder.eval()
    if not {"decoder", "unet", "transformer"} & stages:
        return
    tokenizer, encoder = build_tokenizer(), copy.deepcopy(autoencoder)  # whose decoder is trained in place
    identity = {"pictures": args.num_pictures, "autoencoder": fingerprint(autoencoder)}

    @cache
    def encoded(variation: Variation) -> tuple[np.ndarray, list[Scene]]:
        rendered, scenes = load_pictures(args.output_dir, args.num_pictures, args.seed, variation)
        return encode_pictures(args.output_dir, encoder, rendered, args.seed, variation), scenes

    @cache
    def latents(variation: Variation, shift_factor: float = 0.0) -> CaptionedLatents:
        return CaptionedLatents(*encoded(variation), tokenizer, scaling_factor, shift_factor)

    mean, deviation = latent_statistics(encoded(MORE_SKETCHES)[0])
    scaling_factor, shift_factor = round(1 / deviation, 5), round(mean, 5)
    if "decoder" in stages:
        set_seed(args.seed)
        train(decoder_stage(autoencoder, pictures, deviation, args.decoder_steps, 5e-4, identity))
    if "unet" in stages:
        set_seed(args.seed)
        lessons = [replace(lesson, steps=steps) for lesson, steps in zip(UNET_LESSONS, args.unet_steps)]
        unet = train(unet_stage(lessons, latents, 1e-3, identity, args.compile_unet))
        if "assemble" in stages:
            assemble_diffusion(args.output_dir, autoencoder, unet, scaling_factor)
    if "transformer" in stages:
        set_seed(args.seed)
        lessons = [replace(lesson, steps=steps) for lesson, steps in zip(TRANSFORMER_LESSONS, args.transformer_steps)]
        shifted = partial(latents, shift_factor=shift_factor)
        transformer = train(transformer_stage(lessons, shifted, 7e-4, identity))
        if "assemble" in stages:
            assemble_flow(args.output_dir, autoencoder, transformer, scaling_factor, shift_factor)


def assemble_diffusion(
    output_dir: str | Path, autoencoder: AutoencoderKL, trained: UNetLoss, scaling_factor: float
) -> Path:
    """Writes the diffusion model, a stock `StableDiffusionPipeline` folder of fp16 safetensors, to `model/`."""
    autoencoder.register_to_config(scaling_factor=scaling_factor, shift_factor=None)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=trained.text_encoder,
        tokenizer=build_tokenizer(),
        unet=trained.unet,
        scheduler=build_sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, Path(output_dir) / "model", ["text_encoder"])


def assemble_flow(
    output_dir: str | Path,
    autoencoder: AutoencoderKL,
    trained: TransformerLoss,
    scaling_factor: float,
    shift_factor: float,
) -> Path:
    """Writes the flow-matching model, a stock `StableDiffusion3Pipeline` folder, to `model_flow/`."""
    autoencoder.register_to_config(scaling_factor=scaling_factor, shift_factor=shift_factor)
    pipeline = StableDiffusion3Pipeline(
        vae=autoencoder,
        text_encoder=trained.clip_encoders[0],
        tokenizer=build_tokenizer(),
        text_encoder_2=trained.clip_encoders[1],
        tokenizer_2=build_tokenizer(),
        text_encoder_3=trained.t5_encoder,
        tokenizer_3=build_t5_tokenizer(),
        transformer=trained.transformer,
        scheduler=build_flow_scheduler(),
    )
    return _save(pipeline, Path(output_dir) / "model_flow", ["text_encoder", "text_encoder_2", "text_encoder_3"])


def _save(pipeline, folder: Path, text_encoders: list[str]) -> Path:
    with written_aside(folder) as aside:
        pipeline.to(dtype=torch.float16).save_pretrained(aside, safe_serialization=True)
        for name in text_encoders:
            # transformers loads with the dtype of the config, diffusers with float32; they must agree.
            _edit_config(aside / name, lambda config: {**config, "dtype": "float32"})
        # The name of the autoencoder is a path on this machine.
        _edit_config(aside / "vae", lambda config: {k: v for k, v in config.items() if k != "_name_or_path"})
    pipeline.to(dtype=torch.float32)
    return folder


def _edit_config(folder: Path, edit: Callable[[dict], dict]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2) + "\n")


if __name__ == "__main__":
    arguments = parse_dataclass(RecipeArguments, __doc__, check=lambda args: check_output_dir(args.output_dir))
    with exit_with_error():
        main(arguments)
