"""Keep unwanted concepts out of text-to-image diffusion models."""

import importlib
import importlib.metadata
import logging
import os


# Usage reports that libraries send to their makers unless these are set before they are imported; docs/architecture.md
# says which. A value that the user has set stays.
for _name, _value in (
    ("ORT_DISABLE_TELEMETRY", "1"),
    ("HF_UPDATE_DOWNLOAD_COUNTS", "0"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
):
    os.environ.setdefault(_name, _value)
# transformers warns for every image processor that it uses pillow instead of torchvision, which nothing here needs.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed); falling back" not in record.getMessage()
)
# Public name -> where it is. Read when asked for: nothing heavy happens at import.
_HOMES = {
    "Erasure": "erasure.erasure",
    "ErasedFluxPipeline": "pipelines",
    "ErasedStableDiffusion3Pipeline": "pipelines",
    "ErasedStableDiffusionPipeline": "pipelines",
    "ErasedStableDiffusionXLPipeline": "pipelines",
    "Progress": "progress",
    "SAFETY_CONCEPT": "pipelines.guidance",
    "SafetyConfig": "pipelines.guidance",
    "StableDiffusion3PipelineSafe": "pipelines",
    "StableDiffusionImg2ImgPipelineSafe": "pipelines",
    "StableDiffusionInpaintPipelineSafe": "pipelines",
    "StableDiffusionPipelineSafe": "pipelines",
    "StableDiffusionXLPipelineSafe": "pipelines",
    "attack": "attacks",
    "build_student": "families.students",
    "distill": "distillation.run",
    "disable_safe_latent_diffusion": "pipelines",
    "enable_safe_latent_diffusion": "pipelines",
    "erase": "erasure.run",
    "export": "formats.export",
    "evaluate": "comparison.evaluate",
    "generate": "generation.generate",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name == "__version__":
        return importlib.metadata.version("diffusers-safe")
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
