"""Trains the embedded model from nothing but the sprites. On two CPU cores it takes hours:

    accelerate launch --mixed_precision bf16 -m diffusers_safe.emoji.recipe \\
        --output_dir runs/emoji --stages autoencoder
    accelerate launch -m diffusers_safe.emoji.recipe --output_dir runs/emoji --stages classifier
    accelerate launch --dynamo_backend inductor -m diffusers_safe.emoji.recipe \\
        --output_dir runs/emoji --stages denoiser assemble

Any command can be killed at any moment and run again: it continues from its newest checkpoint. One
process; never compile the autoencoder (docs/architecture.md).
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from ..arguments import check_output_dir, parse_dataclass, told_in_one_line, typed
from ..provenance import fingerprint, write_text
from ..training.checkpoints import checkpoint_step, list_checkpoints, save_checkpoint
from .architecture import build_autoencoder, build_scheduler, build_text_encoder, build_tokenizer, build_unet
from .classifier import HEADS, NOTHING, EmojiClassifier, scene_labels, to_tensor
from .render import RESOLUTION, render_many
from .scenes import OBJECTS, Scene, draw_caption, draw_scene


STAGES = ("autoencoder", "classifier", "denoiser", "assemble")


@typed
@dataclass
class RecipeArguments:
    output_dir: str = field(metadata={"help": "Folder for checkpoints, caches and the finished model in `model/`."})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": f"Any of {', '.join(STAGES)}."})
    num_pictures: int = field(default=48000, metadata={"help": "Pictures rendered once and reused by every stage."})
    autoencoder_steps: int = field(default=4000, metadata={"help": "Steps of 8 pictures."})
    classifier_steps: int = field(default=1500, metadata={"help": "Steps of 64 pictures."})
    denoiser_steps: int = field(default=9000, metadata={"help": "Steps of 32 pictures."})
    autoencoder_lr: float = field(default=1e-3, metadata={"help": "Peak learning rate (AdamW)."})
    classifier_lr: float = field(default=2e-3, metadata={"help": "Peak learning rate (AdamW)."})
    denoiser_lr: float = field(default=1e-3, metadata={"help": "Peak learning rate (AdamW)."})
    checkpoint_minutes: float = field(default=2.0, metadata={"help": "Minutes between two checkpoints of a stage."})
    start_from: str | None = field(
        default=None,
        metadata={"help": "Folder of a finished model: its autoencoder is kept, its UNet and text encoder train on."},
    )
    emphasized_objects: list[str] = field(
        default_factory=list, metadata={"help": "Objects that the denoiser sees four times as often: its weak ones."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of pictures, batches, noise and initial weights."})

    def __post_init__(self):
        if strange := [name for name in self.emphasized_objects if name not in OBJECTS]:
            raise ValueError(f"--emphasized_objects {' '.join(strange)}: unknown; allowed are {', '.join(OBJECTS)}")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"--stages {' '.join(unknown)}: unknown; allowed are {', '.join(STAGES)}")
        for name in ("num_pictures", "autoencoder_steps", "classifier_steps", "denoiser_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("autoencoder_lr", "classifier_lr", "denoiser_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: must be a finite number greater than 0")
        if not self.checkpoint_minutes >= 0:
            raise ValueError(f"--checkpoint_minutes {self.checkpoint_minutes}: must be at least 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: must be at least 0 and less than 2**32")
        if self.start_from is not None and not (Path(self.start_from) / "model_index.json").is_file():
            raise ValueError(f"--start_from {self.start_from}: no model; the folder must hold a model_index.json")


@dataclass
class Stage:
    """One trainable thing: a module whose forward returns the loss, and where its batches come from."""

    name: str
    module: nn.Module
    steps: int
    learning_rate: float
    batch_size: int
    ema_decay: float
    make_batch: Callable[[np.random.Generator, int], dict[str, torch.Tensor]]  # the module's arguments


def learning_rate_factor(step: int, steps: int, warmup: int = 200, decay: float = 0.4) -> float:
    """Warm-up, then constant, then a straight line to zero over the last `decay` of the steps."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (steps * decay)))


def train_stage(stage: Stage, args: RecipeArguments) -> nn.Module:
    """Runs a stage to its end, from its newest checkpoint if there is one.

    Each batch is a function of (seed, stage, step, process), so a stopped run continues as if it had not stopped.

    Returns:
        `nn.Module`: `stage.module` with its averaged weights, on the CPU.
    """
    folder = Path(args.output_dir) / stage.name
    _check_same_run(folder, stage, args)
    finished = folder / f"ema-{stage.steps}.pt"
    if finished.exists():
        stage.module.load_state_dict(torch.load(finished, weights_only=True))
        return stage.module

    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"num_processes {accelerator.num_processes}: the recipe runs in one process")
    module = stage.module
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        module = module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    ema = EMAModel(module.parameters(), decay=stage.ema_decay, use_ema_warmup=True, power=0.8, foreach=True)
    prepared, optimizer = accelerator.prepare(module, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    first = 0
    if checkpoints := list_checkpoints(folder):
        accelerator.load_state(str(checkpoints[-1]))
        first = checkpoint_step(checkpoints[-1])
        if first > stage.steps:
            raise ValueError(f"--{stage.name}_steps {stage.steps}: {folder} is already at step {first}")

    bar = tqdm(
        range(first, stage.steps), stage.name, stage.steps, initial=first, disable=not accelerator.is_main_process
    )
    saved_at, shown, stage_id = time.monotonic(), None, STAGES.index(stage.name)
    for step in bar:
        rng = np.random.default_rng([args.seed, stage_id, step, accelerator.process_index])
        batch = stage.make_batch(rng, stage.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * learning_rate_factor(step, stage.steps)
        loss = prepared(**{key: value.to(accelerator.device) for key, value in batch.items()})
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(module.parameters())
        if step % 20 == 0:
            value = accelerator.gather(loss.detach()).mean().item()
            shown = value if shown is None else 0.95 * shown + 0.05 * value
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
        if time.monotonic() - saved_at > 60 * args.checkpoint_minutes and step + 1 < stage.steps:
            save_checkpoint(accelerator, folder, step + 1, limit=2)
            saved_at = time.monotonic()

    ema.copy_to(module.parameters())
    module = module.to("cpu", memory_format=torch.contiguous_format)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        partial = finished.with_suffix(".partial")
        torch.save(module.state_dict(), partial)
        partial.rename(finished)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return module


def _check_same_run(folder: Path, stage: Stage, args: RecipeArguments) -> None:
    """A stage continues, or is finished, only with the arguments it began with; its number of steps may grow."""
    names = ("seed", "num_pictures", "start_from", "emphasized_objects")
    mine = {"learning_rate": stage.learning_rate, **{name: getattr(args, name) for name in names}}
    path = folder / "arguments.json"
    if not path.exists():
        write_text(path, json.dumps(mine, indent=2) + "\n")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in mine if mine[name] != theirs.get(name)]:
        told = ", ".join(f"{name} {theirs.get(name)} there, {mine[name]} here" for name in changed)
        raise ValueError(f"{folder}: holds a run with other arguments ({told}); give another --output_dir")


# --- autoencoder -----------------------------------------------------------------------------------------------------


class AutoencoderLoss(nn.Module):
    """Absolute error of pixels and of their differences to the neighbours, and a weak pull towards a unit normal.

    The posterior starts narrow (standard deviation 0.08): with the usual 1 the decoder hears only noise at first, and
    the latents collapse.
    """

    def __init__(self, autoencoder: AutoencoderKL, kl_weight: float = 1e-4):
        super().__init__()
        self.autoencoder, self.kl_weight = autoencoder, kl_weight
        nn.init.constant_(autoencoder.quant_conv.bias[4:], -5.0)

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        posterior = self.autoencoder.encode(pictures).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        restored = self.autoencoder.decode(mean + std * noise).sample.float()
        error = (restored - pictures).abs().mean()
        edges = sum(
            (restored.diff(dim=dim) - pictures.diff(dim=dim)).abs().mean()
            for dim in (2, 3)
        )  # fmt: skip
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return error + 0.5 * edges + self.kl_weight * kl


def train_autoencoder(args: RecipeArguments, pictures: np.ndarray) -> AutoencoderKL:
    if args.start_from is not None:
        return AutoencoderKL.from_pretrained(args.start_from, subfolder="vae", dtype=torch.float32).eval()

    def make_batch(rng, size):
        batch = to_tensor(pictures[np.sort(rng.integers(len(pictures), size=size))]) * 2 - 1
        noise = torch.from_numpy(rng.standard_normal((size, 4, 16, 16), dtype=np.float32))
        return {"pictures": batch.contiguous(memory_format=torch.channels_last), "noise": noise}

    module = AutoencoderLoss(build_autoencoder())
    stage = Stage("autoencoder", module, args.autoencoder_steps, args.autoencoder_lr, 8, 0.998, make_batch)
    return train_stage(stage, args).autoencoder.eval()


@torch.inference_mode()
def encode_pictures(args: RecipeArguments, autoencoder: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of every picture's latent, `(N, 8, 16, 16)` float16; computed once, kept on disk."""
    path = Path(args.output_dir) / "cache" / f"latents-{fingerprint(autoencoder)}-{args.seed}-{len(pictures)}.npy"
    if path.exists():
        return np.load(path)
    rows = []
    for start in tqdm(range(0, len(pictures), 250), "encoding"):
        batch = (to_tensor(pictures[start : start + 250]) * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(batch).latent_dist
        rows.append(torch.cat([posterior.mean, posterior.std], dim=1).half().numpy())
    return _save_array(path, np.concatenate(rows))


# --- classifier ------------------------------------------------------------------------------------------------------


class ClassifierLoss(nn.Module):
    def __init__(self, classifier: EmojiClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, pictures: torch.Tensor, **labels: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(pictures)
        return sum(
            F.cross_entropy(logits[head], labels[head], ignore_index=-1, label_smoothing=0.05) for head in HEADS
        )


def train_classifier(
    args: RecipeArguments, autoencoder: AutoencoderKL, pictures: np.ndarray, scenes: list[Scene]
) -> EmojiClassifier:
    labels = scene_labels(scenes)

    @torch.no_grad()
    def make_batch(rng, size):
        chosen = np.sort(rng.integers(len(pictures), size=size))
        batch = to_tensor(pictures[chosen])
        target = {head: labels[head][torch.from_numpy(chosen)].clone() for head in HEADS}
        # A quarter is seen through the autoencoder, as every generated picture will be.
        seen = size // 4
        latents = autoencoder.encode(batch[:seen] * 2 - 1).latent_dist.mode()
        latents = (
            latents + 0.1 * torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)) * latents.std()
        )
        batch[:seen] = (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        # One in ten shows nothing: pieces of a picture in disorder, or two pictures through each other.
        for row in rng.choice(size, size=size // 10, replace=False):
            batch[row] = ruin(batch[row], batch[rng.integers(size)], rng)
            for head, value in {"object": NOTHING, "group": NOTHING}.items():
                target[head][row] = HEADS[head].index(value)
            target["style"][row] = target["background"][row] = -1
        gain = torch.from_numpy(rng.uniform(0.9, 1.1, (size, 3, 1, 1)).astype(np.float32))
        return {"pictures": (batch * gain).clamp(0, 1).clone(), **target}

    module = ClassifierLoss(EmojiClassifier())
    stage = Stage("classifier", module, args.classifier_steps, args.classifier_lr, 64, 0.995, make_batch)
    train_stage(stage, args)
    _refresh_batch_norm(module.classifier, make_batch, args.seed)
    return module.classifier.eval()


def ruin(picture: torch.Tensor, other: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A picture `(3, 64, 64)` on which nobody could name an object."""
    kind = rng.integers(3)
    if kind == 0:  # tiles of 16 pixels, shuffled
        tiles = picture.unfold(1, 16, 16).unfold(2, 16, 16).reshape(3, 16, 16, 16)
        tiles = tiles[:, torch.from_numpy(rng.permutation(16))]
        return tiles.reshape(3, 4, 4, 16, 16).permute(0, 1, 3, 2, 4).reshape(3, 64, 64)
    if kind == 1:  # an empty ground: the picture's own corners, blurred together
        corners = picture[:, ::63, ::63]
        return F.interpolate(corners[None], (64, 64), mode="bilinear")[0]
    other = other.flip(1) if rng.random() < 0.5 else other.roll(20, dims=2)  # two objects through each other
    faded = F.avg_pool2d((0.5 * picture + 0.5 * other)[None], 9, 1, 4, count_include_pad=False)[0]
    return faded


def _refresh_batch_norm(classifier: EmojiClassifier, make_batch, seed: int, batches: int = 40) -> None:
    """The running statistics belong to the last weights; compute them again for the averaged ones."""
    for layer in classifier.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
    classifier.train()
    with torch.no_grad():
        for step in range(batches):
            classifier(make_batch(np.random.default_rng([seed, 99, step]), 64)["pictures"])


# --- text encoder and UNet -------------------------------------------------------------------------------------------


class DenoiserLoss(nn.Module):
    """Epsilon prediction of the UNet, its text encoder trained with it.

    Weighted by 1 / alphas_cumprod, which is the loss of v-prediction (Salimans and Ho, arXiv 2202.00512). In 16 x 16
    latents what a picture shows is decided at the highest noise levels; there the plain loss hardly depends on the
    caption, and the model would learn it last.
    """

    def __init__(self, text_encoder: nn.Module, unet: nn.Module):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        alphas_cumprod = build_scheduler().alphas_cumprod
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        prompt_embeds = self.text_encoder(input_ids=input_ids).last_hidden_state
        noise_pred = self.unet(noisy, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        error = (noise_pred.float() - noise).square().mean(dim=(1, 2, 3))
        return (error / self.alphas_cumprod[timesteps]).mean()


def train_denoiser(args: RecipeArguments, moments: np.ndarray, scenes: list[Scene]) -> DenoiserLoss:
    tokenizer = build_tokenizer()
    scale = latent_scale(moments)
    emphasized = [i for i, scene in enumerate(scenes) if scene.name in args.emphasized_objects]
    pool = np.concatenate([np.arange(len(scenes)), np.array(3 * emphasized, dtype=int)])

    def make_batch(rng, size):
        untold = rng.random(size) < 0.1  # pictures without a caption, in which no object is emphasized
        chosen = np.where(untold, rng.integers(len(scenes), size=size), pool[rng.integers(len(pool), size=size)])
        mean, std = np.split(moments[chosen].astype(np.float32), 2, axis=1)
        latents = scale * (mean + std * rng.standard_normal(mean.shape, dtype=np.float32))
        captions = ["" if skip else draw_caption(scenes[i], rng) for i, skip in zip(chosen, untold)]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        # Half of the timesteps lie above 750, where the caption matters. Strata within each batch: less noise in the
        # loss than independent draws.
        timesteps = 999.99 * (1 - ((rng.permutation(size) + rng.random(size)) / size) ** 2)
        return {
            "latents": torch.from_numpy(latents),
            "noise": torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)),
            "timesteps": torch.from_numpy(timesteps.astype(np.int64)),
            "input_ids": tokens,
        }

    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    if args.start_from is not None:
        finished = StableDiffusionPipeline.from_pretrained(args.start_from, dtype=torch.float32)
        text_encoder.load_state_dict(finished.text_encoder.state_dict())
        unet.load_state_dict(finished.unet.state_dict())
    module = DenoiserLoss(text_encoder, unet)
    stage = Stage("denoiser", module, args.denoiser_steps, args.denoiser_lr, 32, 0.999, make_batch)
    return train_stage(stage, args)


def latent_scale(moments: np.ndarray) -> float:
    """The factor that brings latents to unit variance (SD's `scaling_factor`)."""
    mean, std = np.split(moments.astype(np.float64), 2, axis=1)
    return float(1 / math.sqrt(mean.var() + np.square(std).mean()))


# --- all together ----------------------------------------------------------------------------------------------------


def assemble(args: RecipeArguments, autoencoder: AutoencoderKL, moments: np.ndarray, denoiser: DenoiserLoss) -> None:
    """Writes the finished model: a plain Stable Diffusion pipeline folder, fp16 safetensors."""
    autoencoder.register_to_config(scaling_factor=round(latent_scale(moments), 5))
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=denoiser.text_encoder,
        tokenizer=build_tokenizer(),
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = Path(args.output_dir) / "model"
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    # transformers would load its part in the dtype noted here, diffusers loads in float32: they must agree.
    _edit_config(folder / "text_encoder", lambda config: {**config, "dtype": "float32"})
    # Where the autoencoder came from is a path of this machine.
    _edit_config(folder / "vae", lambda config: {k: v for k, v in config.items() if k != "_name_or_path"})


def _edit_config(folder: Path, edit: Callable[[dict], dict]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2) + "\n")


def load_pictures(args: RecipeArguments) -> tuple[np.ndarray, list[Scene]]:
    """The training pictures `(N, 64, 64, 3)` and their scenes; rendered once, kept on disk."""
    path = Path(args.output_dir) / "cache" / f"pictures-{args.seed}-{args.num_pictures}.npy"
    if path.exists():
        scenes = [draw_scene(np.random.default_rng([args.seed, i])) for i in range(args.num_pictures)]
        return np.load(path, mmap_mode="r"), scenes
    pictures = np.empty((args.num_pictures, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    scenes = []
    for start in tqdm(range(0, args.num_pictures, 500), "rendering"):
        count = min(500, args.num_pictures - start)
        pictures[start : start + count], drawn = render_many(args.seed, start, count)
        scenes += drawn
    return _save_array(path, pictures), scenes


def _save_array(path: Path, array: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.rename(path)
    return array


def main(args: RecipeArguments) -> None:
    set_seed(args.seed)
    pictures, scenes = load_pictures(args)
    autoencoder = train_autoencoder(args, pictures)
    if "classifier" in args.stages:
        train_classifier(args, autoencoder, pictures, scenes).save_pretrained(Path(args.output_dir) / "classifier")
    if "denoiser" in args.stages or "assemble" in args.stages:
        moments = encode_pictures(args, autoencoder, pictures)
        denoiser = train_denoiser(args, moments, scenes)
        if "assemble" in args.stages:
            assemble(args, autoencoder, moments, denoiser)


if __name__ == "__main__":
    arguments = parse_dataclass(RecipeArguments, __doc__, check=lambda args: check_output_dir(args.output_dir))
    with told_in_one_line():
        main(arguments)
