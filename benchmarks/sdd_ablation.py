"""The effect of each SDD setting of the demo, on the embedded model.

    python benchmarks/sdd_ablation.py --output_dir runs/sdd

Each row is one run of `train_sdd.py` that erases "weapon" with all its members, and the evaluation of the demo. The
table (Markdown, also in `table.md`) shows erasure and retention. Finished rows are not repeated.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionPipeline
from erasure_table import GROUP, erasure_table, train_demo

from diffusers_safe.arguments import option, required
from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.comparison.models import LoadedModel
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.emoji.demo import retained_prompts
from diffusers_safe.messages import exit_with_error
from diffusers_safe.output_folders import check_claim, claimed


PAPER = {
    "prompt_order": "paper",
    "sdd_target": "student",
    "negative_guidance_scale": 0.0,
    "loss_space": "prediction",
    "sampling_fraction": 1.0,
    "target_prompt": "",
    "retain_weight": 0.0,
    "retain_unconditional": False,
}
VARIANTS = {
    "demo": {},
    "the paper's rule": PAPER,
    "student target": {"sdd_target": "student"},
    "unconditional prediction not retained": {"retain_unconditional": False},
    "no target prompt": {"target_prompt": ""},
    "no target prompt but negative guidance": {"target_prompt": "", "negative_guidance_scale": 0.3},
    "errors of epsilon": {"loss_space": "prediction"},
    "the whole schedule": {"sampling_fraction": 1.0},
    "no retention": {"retain_weight": 0.0},
    "LoRA of rank 8": {"rank": 8, "learning_rate": 1e-2, "save": "full"},
}


@dataclass
class AblationArguments:
    output_dir: str = required("Folder for all runs. Finished runs are not repeated.")
    only: list[str] = option([], "Names of rows. Default: all.", VARIANTS)
    images_per_prompt: int = option(4, "Images per prompt.", at_least=1)
    train_seed: int = option(0, "Seed of the trainings.", at_least=0, below=2**32)
    image_seed: int = option(0, "Seed of the images.", at_least=0, below=2**32)


def train(name: str, args: AblationArguments) -> StableDiffusionPipeline:
    """The model of a row. It is trained unless it exists."""
    folder = Path(args.output_dir) / "models" / f"{name.replace(' ', '-')}-{args.train_seed}"
    return train_demo(folder, args.train_seed, VARIANTS[name])


def main() -> None:
    args = parse_dataclass(AblationArguments, __doc__, check=lambda args: check_claim(args.output_dir))
    models = [LoadedModel("before", StableDiffusionPipeline.from_pretrained(MODEL_FOLDER))]
    folder = (
        Path(args.output_dir) / f"trained-{args.train_seed}" / f"images-{args.images_per_prompt}-{args.image_seed}"
    )
    with exit_with_error(), claimed(args.output_dir):
        for name in args.only or VARIANTS:
            models.append(LoadedModel(name, train(name, args)))
            table = erasure_table(models, folder, args.images_per_prompt, args.image_seed, retained_prompts(GROUP))
    print(table)


if __name__ == "__main__":
    main()
