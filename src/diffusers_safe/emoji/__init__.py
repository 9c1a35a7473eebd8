"""The embedded model: a small Stable Diffusion that draws emoji, and the judge that names what it drew."""

from pathlib import Path

from ..embedded import EMBEDDED_MODELS


MODEL_NAME = "emoji"
MODEL_FOLDER = EMBEDDED_MODELS[MODEL_NAME]  # a stock StableDiffusionPipeline
JUDGE_FOLDERS = [Path(__file__).parent / "judge"]  # each an EmojiClassifier; the first is that of the evaluations
CLASSIFIER_FOLDER = JUDGE_FOLDERS[0]
