"""Generates images with any pipeline, steered or not, from prompts, files or datasets.

    diffusers-safe generate --prompts "a knife" "a cat" --safety max --safety_concept "a weapon"
    diffusers-safe generate --model CompVis/stable-diffusion-v1-4 --prompts i2p.csv --preset quick  # not run here
    diffusers-safe generate --prompts countries.txt --prompt_template "{} body" --images_per_prompt 100
    accelerate launch -m diffusers_safe.commands.generate --prompts coco_30k.csv --batch_size 8

Published lists of prompts are recognised by their columns; the seed, guidance and size of a row are then used. Images
go to `--output_dir` with a manifest that records how each was made. A stopped run continues when it is started again,
with any number of processes.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..arguments import typed
from ..command_line import parse_dataclass
from ..emoji import MODEL_NAME
from ..generation.generate import generate
from ..generation.manifest import read_manifest
from ..generation.models import DTYPES, SteeredModel
from ..generation.processes import launched_processes
from ..generation.prompts import PromptOptions
from ..generation.rows import GenerationSettings
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, check_claim, claimed
from ..pipelines.guidance import SAFETY_CONFIGS


PRESET_HELP = (
    "Number of prompts, images and steps: smoke (8 prompts, 10 steps), quick (200 prompts, 25 steps) or paper (all "
    "prompts, 10 images of each, 50 steps: SLD's protocol for I2P). Explicit options override the preset."
)
PRESETS = {
    "smoke": {"max_prompts": 8, "images_per_prompt": 1, "num_inference_steps": 10},
    "quick": {"max_prompts": 200, "images_per_prompt": 1, "num_inference_steps": 25},
    "paper": {"images_per_prompt": 10, "num_inference_steps": 50},
}


@typed
@dataclass(kw_only=True)
class GenerateArguments(PromptOptions):
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = PRESETS  # read by `arguments.build_options`

    preset: str | None = field(
        default=None,
        metadata={"help": PRESET_HELP, "choices": PRESETS},
    )
    model: str = field(
        default=MODEL_NAME,
        metadata={"help": "Folder or Hub id of a diffusers pipeline, or emoji, the embedded model."},
    )
    output_dir: str = field(default="runs/generate", metadata={"help": "Output folder: images and their manifest."})
    safety: str | None = field(
        default=None,
        metadata={
            "help": f"Steer with Safe Latent Diffusion: {', '.join(SAFETY_CONFIGS)}. "
            "Default: off; medium if the model is a safe pipeline."
        },
    )
    safety_concept: str | None = field(
        default=None,
        metadata={"help": "Concept that SLD steers away from. Default: that of a safe pipeline, or the paper's list."},
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "Negative prompt, instead of the empty prompt of classifier-free guidance."}
    )
    lora: str | None = field(default=None, metadata={"help": "File, folder or Hub id of a LoRA."})
    lora_scale: float = field(default=1.0, metadata={"help": "Scale of --lora."})
    editing_prompt: list[str] = field(
        default_factory=list, metadata={"help": "Concepts that semantic guidance (SEGA) steers away from."}
    )
    edit_guidance_scale: float = field(default=5.0, metadata={"help": "Guidance scale of SEGA (--editing_prompt)."})
    edit_warmup_steps: int = field(default=10, metadata={"help": "Steps in which SEGA changes nothing."})
    edit_threshold: float = field(
        default=0.9, metadata={"help": "Share of the latent's elements that SEGA does not change, in [0, 1]."}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Number of sampling steps."})
    guidance_scale: float = field(
        default=7.5, metadata={"help": "Scale of classifier-free guidance; at 1 or less it is off."}
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels. Default: the model's."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels. Default: the model's."})
    safety_checker: bool = field(
        default=True,
        metadata={"help": "Use the model's safety checker, if it has one. It makes flagged images black."},
    )
    batch_size: int = field(default=4, metadata={"help": "Number of images generated at once."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the weight files, such as fp16."})
    dtype: str = field(default="float32", metadata={"help": f"Dtype of the weights: {', '.join(DTYPES)}."})

    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})

    def __post_init__(self):
        names = [item.name for item in fields(SteeredModel) if item.name not in ("name", "model")]
        self.made_model = SteeredModel(self.model, self.model, **{name: getattr(self, name) for name in names})
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height {self.height}, width {self.width}: give both or neither")
        for name in ("num_inference_steps", "batch_size", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        self.settings = GenerationSettings(self.num_inference_steps, self.guidance_scale, self.height, self.width)
        self.rows = self.read_rows()
        own = {row.guidance_scale for row in self.rows if row.guidance_scale is not None}
        self.made_model.check_steering(self.settings, own)


def check_surroundings(args: GenerateArguments) -> None:
    """Checks the model's index, the LoRA, and the output folder."""
    args.made_model.check()
    check_claim(args.output_dir)


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(GenerateArguments, __doc__, argv, prog, check_surroundings)
    with exit_with_error():
        with claimed(args.output_dir):  # a second run stops before it loads its model
            pipeline, settings = args.made_model.load(args.settings)
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
    notes = f", {black} of them black" if black else ""
    if others := len(read_manifest(args.output_dir)) - len(manifest):
        notes += f", next to {others} of earlier runs,"
    processes = launched_processes()
    processes.print(f"{len(manifest)} images{notes} in {Path(args.output_dir).resolve()}")
    processes.destroy_process_group()


if __name__ == "__main__":
    main()
