"""The options of an evaluation, whatever models it compares."""

from dataclasses import dataclass, field

from ..arguments import typed
from ..generation.generate import GenerationSettings
from ..generation.prompts import PromptOptions
from ..generation.prompts.sources import is_source
from ..metrics import METRICS, MetricOptions
from .evaluate import without_folder
from .pictures import BLUR_CHOICES, PICTURES


@typed
@dataclass(kw_only=True)
class EvaluationOptions(PromptOptions, MetricOptions):
    """Prompts, sampling, metrics and page, for a command's dataclass to begin with, or a YAML file by itself."""

    metrics: list[str] = field(
        metadata={
            "help": f"What to measure: {', '.join(METRICS)}; or your own as module:name, a Metric or what makes one."
        }
    )
    title: str = field(default="", metadata={"help": "Of the page."})
    num_inference_steps: int = field(default=25, metadata={"help": "Steps of the pipelines' schedulers."})
    guidance_scale: float = field(default=7.5, metadata={"help": "Of classifier-free guidance; 1 or less is none."})
    height: int | None = field(default=None, metadata={"help": "In pixels; default the model's own."})
    width: int | None = field(default=None, metadata={"help": "In pixels; default the model's own."})
    batch_size: int = field(default=4, metadata={"help": "Images generated at once."})
    scoring_batch_size: int = field(default=16, metadata={"help": "Images scored at once."})
    blur: str = field(
        default="flagged",
        metadata={
            "help": f"Which pictures of the page are blurred until clicked: {', '.join(BLUR_CHOICES)}.",
            "choices": BLUR_CHOICES,
        },
    )
    pictures: int = field(
        default=PICTURES,
        metadata={"help": "Pictures of each model on the page: of what was to go, and as many of what was to stay."},
    )

    def __post_init__(self):
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height {self.height}, width {self.width}: give both or neither")
        for name in ("num_inference_steps", "height", "width", "batch_size", "scoring_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        if self.pictures < 0:
            raise ValueError(f"pictures {self.pictures}: must be at least 0")
        self.settings = GenerationSettings(self.num_inference_steps, self.guidance_scale, self.height, self.width)

    @property
    def source(self) -> dict:
        """Where the prompts come from, for the protocol."""
        named = without_folder(self.prompts[0]) if is_source(self.prompts[0]) else "command line"
        names = ("layout", "prompt_template", "categories", "max_prompts", "images_per_prompt", "seed", "split")
        return {"source": named, **{name: getattr(self, name) for name in names if getattr(self, name)}}

    @property
    def shown(self) -> dict:
        """What [`evaluate`] takes beside models, rows, metrics and the folder."""
        return {
            "settings": self.settings,
            "batch_size": self.batch_size,
            "scoring_batch_size": self.scoring_batch_size,
            "title": self.title,
            "blur": self.blur,
            "pictures": self.pictures,
        }
