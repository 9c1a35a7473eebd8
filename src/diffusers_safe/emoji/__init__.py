"""The embedded model: a small Stable Diffusion that draws emoji, and the judge that names what it drew."""

from pathlib import Path


MODEL_FOLDER = Path(__file__).parent / "model"  # a stock StableDiffusionPipeline
CLASSIFIER_FOLDER = Path(__file__).parent / "judge"  # an EmojiClassifier
