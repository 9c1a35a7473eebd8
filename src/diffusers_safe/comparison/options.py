"""The options of evaluations and attacks, whatever models they compare."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..arguments import typed
from ..generation.prompts import PromptOptions
from ..generation.prompts.sources import is_source
from ..generation.rows import GenerationSettings
from ..metrics import METRICS, MetricOptions
from ..report.builder import BLUR_CHOICES, PICTURES
from .models import without_folder


@typed
@dataclass(kw_only=True)
class EvaluationOptions(PromptOptions, MetricOptions):
    """Prompts, sampling, metrics and page: the base of a command's options, or the contents of a YAML file."""

    TITLE: ClassVar[str] = "images and report"

    metrics: list[str] = field(
        metadata={
            "help": f"Metrics: {', '.join(METRICS)}; or your own as module:name, a Metric or a function that returns"
            " one."
        }
    )
    title: str = field(default="", metadata={"help": "Title of the report."})
    num_inference_steps: int = field(default=25, metadata={"help": "Number of sampling steps."})
    guidance_scale: float = field(
        default=7.5, metadata={"help": "Scale of classifier-free guidance; at 1 or less it is off."}
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels. Default: the model's."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels. Default: the model's."})
    batch_size: int = field(default=4, metadata={"help": "Number of images generated at once."})
    scoring_batch_size: int = field(default=16, metadata={"help": "Number of images scored at once."})
    blur: str = field(
        default="flagged",
        metadata={
            "help": f"Images in the report that are blurred until clicked: {', '.join(BLUR_CHOICES)}.",
            "choices": BLUR_CHOICES,
        },
    )
    pictures: int = field(
        default=PICTURES,
        metadata={
            "help": "Number of images per model in the report, for the erased concept and for other concepts"
            " separately. 0: none."
        },
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
        """The source of the prompts, for the protocol."""
        named = without_folder(self.prompts[0]) if is_source(self.prompts[0]) else "command line"
        names = ("layout", "prompt_template", "categories", "max_prompts", "images_per_prompt", "seed", "split")
        return {"source": named, **{name: getattr(self, name) for name in names if getattr(self, name)}}

    @property
    def shown(self) -> dict:
        """Arguments of [`evaluate`] besides models, rows, metrics and the folder."""
        return {
            "settings": self.settings,
            "batch_size": self.batch_size,
            "scoring_batch_size": self.scoring_batch_size,
            "title": self.title,
            "blur": self.blur,
            "pictures": self.pictures,
        }
