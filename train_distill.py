"""Distils a Stable Diffusion model into a smaller one (BK-SDM, arXiv 2305.15798, and its relatives).

    python train_distill.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --student bk-small \\
        --train_data_dir pictures --center_crop --cache_latents --output_dir sd-1.4-small

The result is a stock pipeline: `StableDiffusionPipeline.from_pretrained("sd-1.4-small")`. All arguments: `--help`.
"""

from diffusers_safe.training.distillation import main


if __name__ == "__main__":
    main()
