"""Keep unwanted concepts out of text-to-image diffusion models."""

import importlib


# Public name -> where it is. Read when asked for: nothing heavy happens at import.
_HOMES = {
    "ErasedStableDiffusionPipeline": "pipelines",
    "ErasedStableDiffusionXLPipeline": "pipelines",
    "SAFETY_CONCEPT": "guidance",
    "SafetyConfig": "guidance",
    "StableDiffusionImg2ImgPipelineSafe": "pipelines",
    "StableDiffusionInpaintPipelineSafe": "pipelines",
    "StableDiffusionPipelineSafe": "pipelines",
    "StableDiffusionXLPipelineSafe": "pipelines",
    "build_student": "students",
    "disable_safe_latent_diffusion": "pipelines",
    "enable_safe_latent_diffusion": "pipelines",
    "erase": "training.erasure",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
