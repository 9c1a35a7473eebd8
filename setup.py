from pathlib import Path

from setuptools import find_packages, setup


setup(
    name="diffusers-safe",
    version="0.1.0.dev0",
    description="Keep unwanted concepts out of text-to-image diffusion models.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "src/diffusers_safe/emoji/sprites/*/LICENSE.txt"],
    package_dir={"": "src", "diffusers_safe.recipes": "examples"},
    packages=[*find_packages("src"), "diffusers_safe.recipes"],
    package_data={
        "diffusers_safe": ["py.typed"],
        "diffusers_safe.recipes": ["*.yaml"],
        "diffusers_safe.hub": ["templates/*"],
        "diffusers_safe.report": ["*.css", "templates/*"],
        "diffusers_safe.emoji": [
            "sprites/*/*.png",
            "sprites/*/*.txt",
            "model/*",
            "model/*/*",
            "model_flow/*",
            "model_flow/*/*",
            "judges/*/*",
        ],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6,<3",
        "diffusers>=0.42,<0.43",
        "transformers>=5,<6",
        "accelerate>=1.10,<2",
        "huggingface-hub>=1,<3",
        "datasets>=5,<6",
        "peft>=0.18,<1",
        "safetensors>=0.5,<1",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyarrow>=21",
        "filelock>=3.24",
        "pyyaml>=6",
        "jinja2>=3.1",
        "tqdm>=4.66",
    ],
    extras_require={
        # For the metric `nudity` alone. NudeNet's detector is AGPL-3.0, so `dev` leaves it out.
        "eval": ["nudenet>=3.4.2,<3.5"],
        "app": ["gradio>=5"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "tensorboard>=2.18",
            "scipy>=1.11",
            "torchmetrics>=1.9,<2",
            "scikit-image>=0.24",
        ],
    },
    entry_points={"console_scripts": ["diffusers-safe=diffusers_safe.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
