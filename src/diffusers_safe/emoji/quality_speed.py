"""How well an autoencoder reconstructs, and how fast a pipeline is."""

import math
import platform
import re
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from ..generation.rows import GenerationSettings
from .classifier import to_tensor


def autoencoder_psnr(vae: AutoencoderKL, pictures: np.ndarray, styles: list[str]) -> dict[str, float]:
    """Peak signal-to-noise ratio of reconstructions in dB, from the mean squared error over the images of each style
    and over all.

    Args:
        pictures (`np.ndarray`): `(N, 64, 64, 3)`, `uint8`.
        styles (`list[str]`): N names.
    """
    errors = np.square(reconstruct(vae, pictures).astype(np.float64) - pictures).mean(axis=(1, 2, 3))
    styles = np.array(styles)
    groups = {"all": slice(None), **{style: styles == style for style in dict.fromkeys(styles.tolist())}}
    return {name: round(10 * math.log10(255**2 / errors[chosen].mean()), 2) for name, chosen in groups.items()}


@torch.inference_mode()
def measure_speed(pipeline: DiffusionPipeline, settings: GenerationSettings, batch_size: int) -> dict:
    """Images per second of whole calls, the best of three, and seconds of one forward pass of the denoiser for one
    image with guidance (a batch of two)."""
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    forwards = []

    def call(count: int) -> float:
        started = time.perf_counter()
        arguments = {"height": settings.height, "width": settings.width, "num_images_per_prompt": count}
        pipeline(
            "a cat",
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            **{name: value for name, value in arguments.items() if value is not None},
        )
        return time.perf_counter() - started

    def before(*_) -> None:
        forwards.append(-time.perf_counter())

    def after(*_) -> None:
        forwards[-1] += time.perf_counter()

    bar = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    hooks = [denoiser.register_forward_pre_hook(before), denoiser.register_forward_hook(after)]
    try:
        call(1)
        single = min(forwards)
    finally:
        for hook in hooks:
            hook.remove()
    seconds = min(call(batch_size) for _ in range(3))
    pipeline.set_progress_bar_config(**bar)
    return {
        "images_per_second": batch_size / seconds,
        "batch_size": batch_size,
        "seconds_per_forward": single,
        "device": _device_name(pipeline.device),
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray, batch_size: int = 100) -> np.ndarray:
    """Encodes and decodes images `(N, 64, 64, 3)`, `uint8`; the result has the same shape and dtype."""
    restored = []
    for start in range(0, len(pictures), batch_size):
        batch = to_tensor(pictures[start : start + batch_size]).to(vae.device, vae.dtype) * 2 - 1
        decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample
        shown = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        restored.append(shown.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(restored)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return models[0] if models else platform.machine()
