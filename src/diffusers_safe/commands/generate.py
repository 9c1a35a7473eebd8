"""Generates images with any pipeline, with Safe Latent Diffusion if `--safety` says so.

    diffusers-safe generate --prompts "a knife" "a cat" --safety max --safety_concept "a weapon"
    diffusers-safe generate --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.csv --safety medium

A CSV file needs a column `prompt` and may have `seed` and `id`. Images go to `--output_dir` with a manifest that says
how each came about. A run that was stopped continues when it is started again.
"""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from .. import pipelines
from ..arguments import check_output_dir, parse_dataclass, told_in_one_line
from ..emoji import MODEL_FOLDER
from ..evaluation.generate import GenerationSettings, PromptRow, check_rows, generate
from ..guidance import SAFETY_CONCEPT, SAFETY_CONFIGS, SafetyConfig
from ..pipelines.safe_latent_diffusion import SafeLatentDiffusionMixin, check_concept


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {', '.join(DTYPES)}."})

    def __post_init__(self):
        if self.safety_concept is not None:
            check_concept(self.safety_concept)
        if self.safety is not None:
            warmup = SafetyConfig.named(self.safety).sld_warmup_steps
            if warmup >= self.num_inference_steps:
                raise ValueError(
                    f"num_inference_steps {self.num_inference_steps}: --safety {self.safety} changes nothing in its"
                    f" first {warmup} steps; give more"
                )
            if self.guidance_scale <= 1:
                raise ValueError(f"guidance_scale {self.guidance_scale}: with --safety it must be above 1")
        elif self.safety_concept is not None:
            raise ValueError(f"safety_concept needs --safety: {', '.join(SAFETY_CONFIGS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype '{self.dtype}': unknown; allowed are {', '.join(DTYPES)}")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height {self.height}, width {self.width}: give both or neither")
        for name in ("images_per_prompt", "num_inference_steps", "batch_size", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
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


def pipeline_class(model: str) -> type[DiffusionPipeline]:
    """The class that loads a model, by its index: one of ours, or diffusers' loader of all its own.

    Raises:
        `ValueError`: If there is no pipeline, or its class is neither ours nor one of diffusers.
    """
    try:
        name = DiffusionPipeline.load_config(model).get("_class_name")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model '{model}': no folder or Hub repository of a diffusers pipeline ({reason})") from None
    name = name[-1] if isinstance(name, list) else name
    if name in pipelines.__all__:
        return getattr(pipelines, name)
    if not hasattr(diffusers, str(name)):
        raise ValueError(f"model '{model}': its pipeline class '{name}' is none of diffusers {diffusers.__version__}")
    return DiffusionPipeline


def load_any_pipeline(model: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline of whatever class the model names; a safe one of ours, too."""
    return pipeline_class(model).from_pretrained(model, dtype=dtype)


def check_surroundings(args: GenerateArguments) -> None:
    """The model's index, and then the output folder, which is created."""
    pipeline_class(args.model)
    check_output_dir(args.output_dir)


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(GenerateArguments, __doc__, argv, prog, check_surroundings)
    with told_in_one_line():
        pipeline = load_any_pipeline(args.model, DTYPES[args.dtype]).to(PartialState().device)
        call = safety_call(pipeline, args.safety, args.safety_concept)
        settings = GenerationSettings(
            args.num_inference_steps, args.guidance_scale, args.height, args.width, args.negative_prompt, call
        )
        manifest = generate(
            pipeline, args.rows, args.output_dir, settings, args.batch_size, safety_checker=args.safety_checker
        )
    black = sum(row["black"] for row in manifest)
    told = f", {black} of them black" if black else ""
    print(f"{len(manifest)} images{told} in {Path(args.output_dir).resolve()}")


def safety_call(pipeline: DiffusionPipeline, safety: str | None, concept: str | None) -> dict:
    """Arguments of a call with SLD, which is given to a stock pipeline if `safety` asks for it; `{}` without."""
    if not isinstance(pipeline, SafeLatentDiffusionMixin):
        if safety is None:
            return {}
        pipelines.enable_safe_latent_diffusion(pipeline)
    own = getattr(pipeline, "safety_concept", SAFETY_CONCEPT)
    return {**SafetyConfig.named(safety or "medium"), "safety_concept": own if concept is None else concept}
