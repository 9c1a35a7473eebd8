"""The cost of the recipes in examples/: a table of their `--dry_run` reports, with the real model sizes.

    python benchmarks/recipe_plans.py

The script creates the configs of the models, so nothing is downloaded. `--dry_run` with the models prints the same.
"""

import json
import re
import tempfile
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from random_models import TOKENS
from transformers import CLIPTextConfig

from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.distillation.options import DistillationOptions
from diffusers_safe.distillation.plan import make_plan as make_distillation_plan
from diffusers_safe.emoji.architecture import build_tokenizer
from diffusers_safe.erasure.job import erasure_options
from diffusers_safe.erasure.plan import make_plan
from diffusers_safe.families.students import TEACHER_CONFIGS
from diffusers_safe.methods import find_method
from diffusers_safe.training.plan import GIB, format_duration


EXAMPLES = Path(__file__).parents[1] / "examples"
FAMILIES = {
    "CompVis/stable-diffusion-v1-4": ("StableDiffusionPipeline", TEACHER_CONFIGS["sd-1.5"]),
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", TEACHER_CONFIGS["sdxl"]),
}


def write_configs(folder: Path, pipeline_class: str, unet: dict) -> None:
    """Writes a pipeline folder with configs and a tokenizer, without weights."""
    scheduler = EulerDiscreteScheduler if "XL" in pipeline_class else DDIMScheduler
    with torch.device("meta"):
        UNet2DConditionModel(**unet).save_config(folder / "unet")
        blocks = {"block_out_channels": (8,) * 4, "norm_num_groups": 4}
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **blocks
        ).save_config(folder / "vae")
    scheduler().save_config(folder / "scheduler")
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TOKENS
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(folder / name)
    CLIPTextConfig(hidden_size=768).save_pretrained(folder / "text_encoder")
    CLIPTextConfig(hidden_size=1280, projection_dim=1280).save_pretrained(folder / "text_encoder_2")
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": scheduler.__name__}
    index = {name: ["diffusers", class_name] for name, class_name in parts.items()}
    index |= {name: ["transformers", "CLIPTextModel"] for name in ("text_encoder", "text_encoder_2")}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class, **index}))


def write_models(folder: Path) -> dict[str, Path]:
    """Writes the configs of all models; returns their folders."""
    models = {name: folder / pipeline_class for name, (pipeline_class, _) in FAMILIES.items()}
    for name, (pipeline_class, unet) in FAMILIES.items():
        models[name].mkdir()
        write_configs(models[name], pipeline_class, unet)
    return models


def plan_row(recipe: Path, models: dict[str, Path]) -> str:
    (script,) = set(re.findall(r"train_(\w+)\.py", recipe.read_text()))
    kind = DistillationOptions if script == "distill" else erasure_options(find_method(script))
    words = ["--config", str(recipe), "--output_dir", "out"]
    name = yaml.safe_load(recipe.read_text())["pretrained_model_name_or_path"]
    if name in models:
        words += ["--pretrained_model_name_or_path", str(models[name])]
    if script == "distill":  # another command creates its pictures
        words += ["--train_data_dir", str(EXAMPLES)]
    options = parse_dataclass(kind, argv=words, check=kind.resolve, fixed={"method": script})
    plan = (make_distillation_plan if script == "distill" else make_plan)(options)
    petaflops = plan.flops * plan.num_samples / 1e15
    return (
        f"| [{recipe.stem}]({recipe.name}) | {plan.selected[1] / 1e6:,.2f} of {plan.total[1] / 1e6:,.0f} M | "
        f"{options.run.max_train_steps:,} | {sum(plan.forwards.values()):.1f} | {petaflops:,.3g} | "
        f"{format_duration(petaflops * 10)} | {sum(plan.memory.values()) / GIB:.1f} GiB |"
    )


def main() -> None:
    print("| recipe | trained | steps | forward passes per sample | PFLOP | at 100 TFLOP/s | memory, float32 |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        for recipe in sorted(EXAMPLES.glob("*.yaml")):
            print(plan_row(recipe, models))


if __name__ == "__main__":
    main()
