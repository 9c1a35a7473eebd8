"""Generates images with any pipeline, with Safe Latent Diffusion if `--safety` says so.

    diffusers-safe generate --prompts "a knife" "a cat" --safety max --safety_concept "a weapon"
    diffusers-safe generate --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.csv --safety medium

A CSV file needs a column `prompt` and may have `seed` and `id`. Images go to `--output_dir` with a manifest that says
how each came about. A run that was stopped continues when it is started again.
"""

import csv
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..arguments import check_output_dir, parse_dataclass, told_in_one_line
from ..emoji import MODEL_FOLDER
from ..evaluation.generate import GenerationSettings, PromptRow, check_rows, generate
from ..guidance import SAFETY_CONFIGS
from .subject import DTYPES, Subject


@dataclass
class GenerateArguments:
    prompts: list[str] = field(metadata={"help": "Prompts, or one .csv file with a column `prompt`."})
    model: str = field(default=str(MODEL_FOLDER), metadata={"help": "Folder or Hub id; default the embedded model."})
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
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt, with seeds one apart."})
    seed: int = field(default=0, metadata={"help": "Seed of a prompt's first image, unless the file gives one."})
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

    def __post_init__(self):
        names = [item.name for item in fields(Subject) if item.name not in ("name", "model")]
        self.subject = Subject(self.model, self.model, **{name: getattr(self, name) for name in names})
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height {self.height}, width {self.width}: give both or neither")
        for name in ("images_per_prompt", "num_inference_steps", "batch_size", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        self.settings = GenerationSettings(self.num_inference_steps, self.guidance_scale, self.height, self.width)
        self.subject.check_steering(self.settings)
        self.rows = read_rows(self.prompts, self.images_per_prompt, self.seed)


def read_rows(prompts: list[str], images_per_prompt: int, seed: int) -> list[PromptRow]:
    """The images to generate, from prompts or one `.csv` file.

    Raises:
        `ValueError`: If there is no prompt, the file cannot be read or has no column `prompt`, or a seed is no number.
    """
    files = [prompt for prompt in prompts if prompt.lower().endswith(".csv")]
    if files and len(prompts) > 1:
        raise ValueError(f"prompts {files[0]}: a file must be the only one")
    if files:
        path = Path(prompts[0])
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file, strict=True)
                entries, columns = list(table), table.fieldnames or []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"prompts file {path}: cannot be read ({error})") from None
        if "prompt" not in columns:
            raise ValueError(f"prompts file {path}: has no column 'prompt', only {', '.join(columns) or 'nothing'}")
    else:
        entries = [{"prompt": prompt} for prompt in prompts]
    rows = []
    for number, entry in enumerate(entries):
        if not (entry["prompt"] or "").strip():
            raise ValueError(f"prompt {number + 1}: is blank")
        name = entry.get("id") or f"{number:05}-{re.sub(r'[^a-z0-9]+', '-', entry['prompt'].lower())[:40].strip('-')}"
        try:
            first = int(entry.get("seed") or seed)
        except ValueError:
            raise ValueError(f"prompt {number + 1}: seed '{entry['seed']}' is no whole number") from None
        rows += [PromptRow(f"{name}-{first + i}", entry["prompt"], first + i) for i in range(images_per_prompt)]
    check_rows(rows)
    return rows


def check_surroundings(args: GenerateArguments) -> None:
    """The model's index, the LoRA, and then the output folder, which is created."""
    args.subject.check()
    check_output_dir(args.output_dir)


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(GenerateArguments, __doc__, argv, prog, check_surroundings)
    with told_in_one_line():
        pipeline, settings = args.subject.load(args.settings)
        manifest = generate(
            pipeline, args.rows, args.output_dir, settings, args.batch_size, safety_checker=args.safety_checker
        )
    black = sum(row["black"] for row in manifest)
    told = f", {black} of them black" if black else ""
    print(f"{len(manifest)} images{told} in {Path(args.output_dir).resolve()}")
