"""Erases concepts from a Stable Diffusion model by Erasing Concepts from Diffusion (ESD, arXiv 2303.07345).

    python train_esd.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --concepts "Van Gogh" --train_method esd-x --output_dir sd-1.4-without-van-gogh

The settings are the paper's; `--preset esd-2025` has those of the authors' newer code. It was not run here. The result
is a stock pipeline: `StableDiffusionPipeline.from_pretrained("sd-1.4-without-van-gogh")`. All arguments: `--help`.
"""

from diffusers_safe.training.esd import main


if __name__ == "__main__":
    main()
