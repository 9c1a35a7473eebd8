"""The embedded model: a small Stable Diffusion that draws emoji, and the judge that names what it drew."""

from pathlib import Path

from ..embedded import EMBEDDED_MODELS


MODEL_NAME = "emoji"
MODEL_FOLDER = EMBEDDED_MODELS[MODEL_NAME]  # a stock StableDiffusionPipeline
CLASSIFIER_FOLDER = Path(__file__).parent / "judge"  # an EmojiClassifier
