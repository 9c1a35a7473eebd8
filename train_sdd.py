"""Erases concepts from a Stable Diffusion model by Safe self-Distillation Diffusion (SDD, arXiv 2307.05977).

    python train_sdd.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --concepts "nudity" --output_dir sd-1.4-safe

This is the paper's recipe: options that are not given have its values. It was not run here.
The result is a stock pipeline: `StableDiffusionPipeline.from_pretrained("sd-1.4-safe")`. All arguments: `--help`.
"""

from diffusers_safe.training.sdd import main


if __name__ == "__main__":
    main()
