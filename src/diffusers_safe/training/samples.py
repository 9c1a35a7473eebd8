"""Images before and after, from the same prompts and seeds, while a model trains and for its card."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from ..families import denoiser_of
from ..generation.generate import GenerationSettings, sample_images
from ..output_folders import prepare_files, record_written
from ..progress import Progress, ProgressCallback
from ..report.grid import GRID_NAME, SampleGroup, draw_grid, save_grid
from ..weights.trained import TrainedWeights
from .options import VALIDATION, ValidationOptions


class Samples:
    """The same prompts and seeds again and again, before and after, as one labelled image.

    The pipeline's safety checker stays on: a published image does not show what it hides.

    Args:
        pipeline (`DiffusionPipeline`): Around the denoiser.
        weights (`TrainedWeights`): Of the denoiser.
        erased (`list[str]`): Prompts that name what was erased.
        kept (`list[str]`): Prompts that have nothing to do with it.
        num_images (`int`, defaults to 1): Images of each prompt, with the seeds `seed`, `seed + 1`, ...
        seed (`int`, defaults to 0): Of the first image of every prompt.
        settings (`GenerationSettings`, *optional*): How to sample.
        teacher (`DiffusionPipeline`, *optional*): Generates the images before; the frozen weights by default.

    Attributes:
        last (`Image.Image`, *optional*): The image that was made last.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        weights: TrainedWeights,
        erased: list[str],
        kept: list[str],
        num_images: int = 1,
        seed: int = 0,
        settings: GenerationSettings | None = None,
        teacher: DiffusionPipeline | None = None,
    ):
        self.pipeline, self.weights, self.erased, self.kept = pipeline, weights, erased, kept
        self.num_images, self.seed, self.settings = num_images, seed, settings or GenerationSettings()
        self.teacher = teacher
        self._before = None
        self.last: Image.Image | None = None

    def draw(self, which: str = "student") -> Image.Image:
        """The image; `which` are the weights after: `"student"` or `"ema"`."""
        if self._before is None:
            self._before = (
                self._sample(self.pipeline, "frozen") if self.teacher is None else self._sample(self.teacher)
            )
        after, count = self._sample(self.pipeline, which), len(self.erased)
        groups = []
        titles = ("to erase", "to keep") if self.teacher is None else ("forbidden", "to learn")
        for title, tone, prompts, part in (
            (titles[0], "gone", self.erased, slice(count)),
            (titles[1], "kept", self.kept, slice(count, None)),
        ):
            if prompts:
                sides = ([row[part] for row in rows] for rows in (self._before, after))
                groups.append(SampleGroup(title, tone, prompts, *sides))
        last = self.seed + self.num_images - 1
        seeds = f"seed {self.seed}" if self.num_images == 1 else f"seeds {self.seed} to {last}"
        sides = ("before", "after") if self.teacher is None else ("teacher", "student")
        self.last = draw_grid(
            groups,
            f"{' and '.join(sides).capitalize()} with the same noise: {seeds}, {self.settings.num_inference_steps} "
            f"steps, guidance {self.settings.guidance_scale:g}. Not chosen by hand.",
            sides,
        )
        return self.last

    def _sample(self, pipeline: DiffusionPipeline, which: str | None = None) -> list[list[Image.Image]]:
        prompts = [*self.erased, *self.kept]
        denoiser = denoiser_of(pipeline)
        trains = denoiser.training
        denoiser.eval()
        # A teacher may be elsewhere, and in half precision, while the rest of its pipeline is not.
        home, dtype = denoiser.device, denoiser.dtype
        if pipeline is self.teacher:
            torch.nn.Module.to(denoiser, denoiser_of(self.pipeline).device, torch.float32)  # diffusers' own warns
        with nullcontext() if which is None else self.weights.use(which):
            rows = [
                sample_images(pipeline, prompts, [self.seed + i] * len(prompts), self.settings, safety_checker=True)
                for i in range(self.num_images)
            ]
        denoiser.train(trains)
        if pipeline is self.teacher:
            torch.nn.Module.to(denoiser, home, dtype)
        return rows


class Validation:
    """Generates [`Samples`] during a run: `validation/step-<N>.png` in the output folder, and the tracker.

    Args:
        accelerator (`Accelerator`): The main process generates; the others wait.
        samples (`Samples`): The images.
        output_weights (`str`): Whose weights are the result: `"student"` or `"ema"`.
        output_dir (`str`): Where the folder `validation` is.
        options (`ValidationOptions`): How often.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        samples: Samples,
        output_weights: str,
        output_dir: str,
        options: ValidationOptions,
    ):
        self.accelerator, self.samples, self.output_weights = accelerator, samples, output_weights
        self.folder = Path(output_dir) / VALIDATION
        self.every = options.validation_steps

    def after_step(self, step: int, is_last: bool) -> None:
        if step % self.every and not is_last:
            return
        if self.accelerator.is_main_process:
            self.samples.pipeline.to(self.accelerator.device)
            picture = self.samples.draw(self.output_weights)
            name = f"{self.folder.name}/step-{step}.png"
            prepare_files(self.folder.parent, name)
            self.folder.mkdir(exist_ok=True)
            picture.save(self.folder / f"step-{step}.png")
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.asarray(picture)[None]}, step=step, **layout)
        self.accelerator.wait_for_everyone()


def with_validation(validation: Validation | None, callback: ProgressCallback | None) -> ProgressCallback | None:
    """A callback for each step: validation images, if there are any, then the caller's own."""
    if validation is None:
        return callback

    def after_step(progress: Progress) -> None:
        validation.after_step(progress.done, progress.done == progress.total)
        if callback is not None:
            callback(progress)

    return after_step


def save_card_image(samples: Samples, device: torch.device, folder: str | Path) -> None:
    """Saves the image of the model card: that of validation after the last step, else a new one."""
    if samples.last is None:
        samples.pipeline.to(device)
        samples.draw()
    save_grid(samples.last, folder)
    record_written(folder, GRID_NAME)
