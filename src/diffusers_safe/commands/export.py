"""Converts an erased model, of this package or of another tool, to another format.

    diffusers-safe export runs/knife --to lora --rank 16 --output_dir runs/knife-lora
    diffusers-safe export esd-dog-from-dog-esdx.safetensors --base_model user/base --to full --output_dir runs/dog

The source is a file, a folder or a Hub id: a whole pipeline, a denoiser, a file of changed weights (of this package,
or of ESD, 2023 and 2025), a CompVis checkpoint, a LoRA. An erasure.json is written with the result.

  full        a stock pipeline folder
  DENOISERS
  partial     the changed weights only, with the base model's fingerprint
  lora        for load_lora_weights of a stock pipeline; the approximation error is printed
  kohya       the same LoRA by the names that ComfyUI and A1111 read
  single-file a checkpoint for ComfyUI, A1111 and from_single_file (Stable Diffusion 1.x, 2.x, XL)
"""

from pathlib import Path

from ..command_line import parse_dataclass
from ..families import denoiser_names
from ..formats.export import ExportOptions, run_export
from ..messages import exit_with_error


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    rows = [f"{name:11} the whole denoiser, a stock diffusers folder" for name in denoiser_names()]
    description = __doc__.replace("DENOISERS", "\n  ".join(rows))
    check = ExportOptions.check_surroundings
    options = parse_dataclass(ExportOptions, description, argv, prog, check, positional="source")
    lora = run_export(options)
    if lora is not None:
        worst = lora.worst
        print(f"rank {lora.rank}: error {lora.error:.2%} of the change, at worst {lora.errors[worst]:.2%} ({worst})")
        if lora.left_out:
            lost = f"{lora.lost:.2%} of the change"
            print(f"left out: {len(lora.left_out)} changed biases and norms ({lost}), such as {lora.left_out[0]}")
    print(f"{options.to} in {Path(options.output_dir).resolve()}")
