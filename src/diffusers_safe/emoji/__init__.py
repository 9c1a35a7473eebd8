"""The embedded model: a small Stable Diffusion model that generates emoji, and a classifier that judges its images."""

from pathlib import Path

from ..embedded import EMBEDDED_MODELS


MODEL_NAME = "emoji"
MODEL_FOLDER = EMBEDDED_MODELS[MODEL_NAME]  # a stock StableDiffusionPipeline
JUDGE_FOLDERS = [Path(__file__).parent / "judge"]  # folders of EmojiClassifiers; evaluations use the first
CLASSIFIER_FOLDER = JUDGE_FOLDERS[0]
