"""The embedded model, a small Stable Diffusion model that generates emoji, and two judges of its images."""

from pathlib import Path

from ..embedded import EMBEDDED_MODELS


MODEL_NAME = "emoji"
MODEL_FOLDER = EMBEDDED_MODELS[MODEL_NAME]  # a stock StableDiffusionPipeline
JUDGE_FOLDERS = [Path(__file__).parent / "judges" / name for name in ("judge", "second_judge")]
CLASSIFIER_FOLDER = JUDGE_FOLDERS[0]  # the judge of the evaluations; the second one checks it
