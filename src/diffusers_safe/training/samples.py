"""Pictures of a model that forgets, beside what its base model draws from the same seeds."""

from diffusers import DiffusionPipeline
from PIL import Image

from ..evaluation.generate import GenerationSettings, sample_images
from ..evaluation.grid import SampleGroup, draw_grid
from ..weights import TrainedWeights


MOST_PROMPTS = 4


def sample_grid(
    pipeline: DiffusionPipeline,
    weights: TrainedWeights,
    erased: list[str],
    kept: list[str],
    num_images: int = 1,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    seed: int = 0,
) -> Image.Image:
    """Draws prompts with the frozen weights and with the student's, and puts all of it into one labelled picture.

    The pipeline's safety checker stays on: what it hides, a picture that is published does not show either.

    Args:
        pipeline (`DiffusionPipeline`): Around the denoiser, on the device that is to draw.
        weights (`TrainedWeights`): Of the denoiser.
        erased (`list[str]`): Prompts that name what was erased; of many, four spread evenly over the list are drawn.
        kept (`list[str]`): Prompts that have nothing to do with it; the first four are drawn.
        num_images (`int`, defaults to 1): Images of each prompt, with the seeds `seed`, `seed + 1`, ...
        num_inference_steps (`int`, defaults to 25): Of the pipeline's scheduler.
        guidance_scale (`float`, defaults to 7.5): Of classifier-free guidance.
        seed (`int`, defaults to 0): Of the first image of every prompt.
    """
    count = min(len(erased), MOST_PROMPTS)
    erased = [erased[i * len(erased) // count] for i in range(count)]
    kept = kept[:MOST_PROMPTS]
    prompts = [*erased, *kept]
    settings = GenerationSettings(num_inference_steps, guidance_scale)
    sides = []
    for which in ("frozen", "student"):
        with weights.use(which):
            rows = [
                sample_images(pipeline, prompts, [seed + i] * len(prompts), settings, safety_checker=True)
                for i in range(num_images)
            ]
        sides.append(rows)
    groups = [SampleGroup("to erase", "gone", erased, *([row[: len(erased)] for row in rows] for rows in sides))]
    if kept:
        groups.append(SampleGroup("to keep", "kept", kept, *([row[len(erased) :] for row in rows] for rows in sides)))
    seeds = f"seed {seed}" if num_images == 1 else f"seeds {seed} to {seed + num_images - 1}"
    caption = (
        f"Before and after with the same noise: {seeds}, {num_inference_steps} steps, guidance {guidance_scale:g}. "
        "Not chosen by hand."
    )
    return draw_grid(groups, caption)
