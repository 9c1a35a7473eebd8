"""Generates images with any pipeline, steered or not, from prompts of any kind.

    diffusers-safe generate --prompts "a knife" "a cat" --safety max --safety_concept "a weapon"
    diffusers-safe generate --model CompVis/stable-diffusion-v1-4 --prompts i2p.csv --preset quick  # not run here
    diffusers-safe generate --prompts countries.txt --prompt_template "{} body" --images_per_prompt 100
    accelerate launch -m diffusers_safe.commands.generate --prompts coco_30k.csv --batch_size 8

Published lists of prompts are known by their columns; the seed, guidance and size of a row then count. Images go to
`--output_dir` with a manifest that says how each came about. A run that was stopped continues when it is started
again, in however many processes.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from ..arguments import exit_with_error, parse_dataclass, typed
from ..emoji import MODEL_NAME
from ..generation.generate import GenerationSettings, generate, read_manifest
from ..generation.models import DTYPES, Subject
from ..generation.processes import launched_processes
from ..generation.prompts import PromptOptions
from ..output_folders import OVERWRITE_HELP, check_claim, claimed
from ..pipelines.guidance import SAFETY_CONFIGS


PRESETS = {
    "smoke": {"max_prompts": 8, "images_per_prompt": 1, "num_inference_steps": 10},
    "quick": {"max_prompts": 200, "images_per_prompt": 1, "num_inference_steps": 25},
    "paper": {"images_per_prompt": 10, "num_inference_steps": 50},
}


@typed
@dataclass(kw_only=True)
class GenerateArguments(PromptOptions):
    preset: str | None = field(
        default=None,
        metadata={
            "help": "smoke (8 prompts, 10 steps), quick (200 prompts, 25 steps) or paper (all prompts, 10 images of"
            " each, 50 steps: SLD's for I2P). Other options win.",
            "choices": PRESETS,
        },
    )
    model: str = field(default=MODEL_NAME, metadata={"help": "Folder or Hub id, or the name of an embedded model."})
    output_dir: str = field(default="runs/generate", metadata={"help": "Where the images go."})
    safety: str | None = field(
        default=None,
        metadata={
            "help": f"Steer with Safe Latent Diffusion: {', '.join(SAFETY_CONFIGS)}. "
            "Default: no; medium if the model is a safe pipeline."
        },
    )
    safety_concept: str | None = field(
        default=None, metadata={"help": "What to steer away from; default the pipeline's own, or the paper's list."}
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "Stands in for the empty prompt of guidance."})
    lora: str | None = field(default=None, metadata={"help": "File, folder or Hub id of a LoRA."})
    lora_scale: float = field(default=1.0, metadata={"help": "How much of the LoRA."})
    editing_prompt: list[str] = field(
        default_factory=list, metadata={"help": "Concepts that semantic guidance (SEGA) steers away from."}
    )
    edit_guidance_scale: float = field(default=5.0, metadata={"help": "How strongly SEGA steers."})
    edit_warmup_steps: int = field(default=10, metadata={"help": "Steps in which SEGA changes nothing."})
    edit_threshold: float = field(
        default=0.9, metadata={"help": "Share of the elements that SEGA leaves alone, in [0, 1]."}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Steps of the pipeline's scheduler."})
    guidance_scale: float = field(default=7.5, metadata={"help": "Of classifier-free guidance; 1 or less is none."})
    height: int | None = field(default=None, metadata={"help": "In pixels; default the model's own."})
    width: int | None = field(default=None, metadata={"help": "In pixels; default the model's own."})
    safety_checker: bool = field(
        default=True, metadata={"help": "Let the model's safety checker, if it has one, blacken what it flags."}
    )
    batch_size: int = field(default=4, metadata={"help": "Images at once."})
    revision: str | None = field(default=None, metadata={"help": "Of the model on the Hub."})
    variant: str | None = field(default=None, metadata={"help": "Of the weight files, such as fp16."})
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {', '.join(DTYPES)}."})

    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})

    def __post_init__(self):
        names = [item.name for item in fields(Subject) if item.name not in ("name", "model")]
        self.subject = Subject(self.model, self.model, **{name: getattr(self, name) for name in names})
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height {self.height}, width {self.width}: give both or neither")
        for name in ("num_inference_steps", "batch_size", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        self.settings = GenerationSettings(self.num_inference_steps, self.guidance_scale, self.height, self.width)
        self.rows = self.read_rows()
        own = {row.guidance_scale for row in self.rows if row.guidance_scale is not None}
        self.subject.check_steering(self.settings, own)


def check_surroundings(args: GenerateArguments) -> None:
    """The model's index, the LoRA, and the output folder."""
    args.subject.check()
    check_claim(args.output_dir)


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(GenerateArguments, __doc__, argv, prog, check_surroundings, PRESETS)
    with exit_with_error():
        with claimed(args.output_dir):  # another run ends before it loads its model
            pipeline, settings = args.subject.load(args.settings)
        manifest = generate(
            pipeline,
            args.rows,
            args.output_dir,
            settings,
            args.batch_size,
            safety_checker=args.safety_checker,
            overwrite=args.overwrite,
        )
    black = sum(row["black"] for row in manifest)
    told = f", {black} of them black" if black else ""
    if others := len(read_manifest(args.output_dir)) - len(manifest):
        told += f", next to {others} of earlier runs,"
    processes = launched_processes()
    processes.print(f"{len(manifest)} images{told} in {Path(args.output_dir).resolve()}")
    processes.destroy_process_group()


if __name__ == "__main__":
    main()
