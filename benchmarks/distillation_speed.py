"""Time of a distillation step: a plain loop, our loop, and our loop with --cache_latents.

    python benchmarks/distillation_speed.py
    python benchmarks/distillation_speed.py --model CompVis/stable-diffusion-v1-4 --train_batch_size 8  # not run here

The plain loop follows the reference implementation: autoencoder and text encoder run at every step, the features of
both UNets are captured, and everything is float32. The variants alternate in each round, so that changes of the
machine's speed affect all of them; ratios are computed within each round.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional
from tqdm.auto import tqdm

from diffusers_safe.arguments import option
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.diffusion.noise import NoiseSchedule
from diffusers_safe.distillation.data import make_latents, open_rows
from diffusers_safe.distillation.loop import DistillationLoop
from diffusers_safe.distillation.objective import FeatureTap, feature_pairs
from diffusers_safe.distillation.options import DistillationOptions
from diffusers_safe.distillation.run import student_pipeline
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.emoji.dataset import FILE_NAME, emoji_dataset
from diffusers_safe.families import load_pipeline, make_family
from diffusers_safe.families.students import build_student
from diffusers_safe.messages import exit_with_error
from diffusers_safe.training.pictures import Preprocessing, make_pictures


@dataclass
class SpeedArguments:
    model: str = option(str(MODEL_FOLDER), "Teacher: folder or Hub id.")
    student: str = option("bk-small", "Name of the student.")
    train_batch_size: int = option(8, "Samples per step.", at_least=1)
    num_images: int = option(128, "Number of training pictures.", at_least=1)
    rounds: int = option(8, "Number of timed rounds, plus one that is not counted.", at_least=1)
    steps: int = option(3, "Steps per round.", at_least=1)


class PlainLoop:
    """A straightforward implementation of the task, output and feature terms."""

    def __init__(self, options: DistillationOptions, device: torch.device):
        self.batch_size, self.device = options.run.train_batch_size, device
        self.pipeline = load_pipeline(options.model.pretrained_model_name_or_path).to(device)
        self.teacher = self.pipeline.unet
        self.student = build_student(self.teacher, options.student.student).to(device).train()
        pairs = feature_pairs(self.student.config, self.teacher.config, options.loss.feature_map)
        self.own = FeatureTap(self.student, [own for own, _ in pairs])
        self.taught = FeatureTap(self.teacher, [other for _, other in pairs])
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=options.optimizer.learning_rate)
        rows = open_rows(options.data, None, options.output.seed)
        preprocessing = Preprocessing(make_family(self.pipeline).picture_size, center_crop=True)
        self.pictures = make_pictures(rows, preprocessing, options.output.seed, self.batch_size)
        self.noise = NoiseSchedule(self.pipeline.scheduler)

    def train_step(self, step: int) -> float:
        """One optimizer step; returns the loss."""
        batch = self.pictures.batch(step, range(self.batch_size))
        generators = [torch.Generator().manual_seed(row) for row in range(self.batch_size)]
        with torch.no_grad():
            moments = self.pipeline.vae.encode(batch.pixel_values.to(self.device)).latent_dist
            latents = moments.sample() * self.pipeline.vae.config.scaling_factor
            prompts = self.pipeline.encode_prompt(batch.captions, self.device, 1, False)[0]
        noisy = self.noise.add(latents, generators)
        with torch.no_grad(), self.taught:
            teacher_pred = self.teacher(noisy.model_input, noisy.timesteps, prompts).sample
        with self.own:
            student_pred = self.student(noisy.model_input, noisy.timesteps, prompts).sample
        loss = functional.mse_loss(student_pred, noisy.target) + functional.mse_loss(student_pred, teacher_pred)
        loss = loss + sum(functional.mse_loss(*pair) for pair in zip(self.own.take(), self.taught.take()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def make_variants(args: SpeedArguments, folder: Path, accelerator: Accelerator) -> dict:
    """The variants by name; each has a method `train_step`."""
    data = folder / "data"
    data.mkdir()
    emoji_dataset(args.num_images, cache_dir=str(folder / "arrow")).to_parquet(data / FILE_NAME)

    def arguments(cached: bool) -> DistillationOptions:
        return DistillationOptions.of(
            pretrained_model_name_or_path=args.model, student=args.student, train_data_dir=str(data),
            caption_column="caption", center_crop=True, cache_latents=cached, output_dir=str(folder / "out"),
            train_batch_size=args.train_batch_size,
        )  # fmt: skip

    def ours(cached: bool) -> DistillationLoop:
        given, teacher = arguments(cached), load_pipeline(args.model)
        family = make_family(teacher)
        student = make_family(student_pipeline(teacher, given))
        latents = make_latents(accelerator, family, open_rows(given.data, None, given.output.seed), given)
        loop = DistillationLoop(accelerator, family, student, latents, given)
        loop.prepare()
        return loop

    return {
        "plain loop": PlainLoop(arguments(False), accelerator.device),
        "ours": ours(False),
        "ours, --cache_latents": ours(True),
    }


def main() -> None:
    args = parse_dataclass(SpeedArguments, __doc__)
    accelerator = Accelerator()
    with exit_with_error(), tempfile.TemporaryDirectory() as folder:
        variants = make_variants(args, Path(folder), accelerator)
        times = {name: [] for name in variants}
        for turn in tqdm(range(args.rounds + 1), "rounds"):
            for name, variant in variants.items():
                started = time.perf_counter()
                for step in range(args.steps):
                    variant.train_step(turn * args.steps + step)
                if turn > 0:
                    times[name].append((time.perf_counter() - started) / args.steps)
    print("| | s/step | ratio to the plain loop, median [min, max] |\n|---|---|---|")
    for name, spent in times.items():
        ratio = np.array(spent) / np.array(times["plain loop"])
        print(f"| {name} | {np.median(spent):.3f} | {np.median(ratio):.2f} [{ratio.min():.2f}, {ratio.max():.2f}] |")
    print(f"\n{args.student}, batch {args.train_batch_size}, {args.rounds} rounds, {accelerator.device}")


if __name__ == "__main__":
    main()
