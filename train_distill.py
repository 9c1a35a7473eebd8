"""Distils a Stable Diffusion model into a smaller one (BK-SDM, arXiv 2305.15798, and its relatives).

    python train_distill.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --student bk-small \\
        --gradient_accumulation_steps 4 --train_data_dir pictures --output_dir sd-1.4-small

This is the paper's recipe, in float32. It was not run here.
The result is a stock pipeline: `StableDiffusionPipeline.from_pretrained("sd-1.4-small")`. All arguments: `--help`.
"""

from diffusers_safe.training.distillation import main


if __name__ == "__main__":
    main()
