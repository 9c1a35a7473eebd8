"""Published settings of ESD, pinned: one table, which `--help` and docs/methods.md show."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """The settings of one publication.

    Attributes:
        source (`str`): Where they are published.
        options (`dict`): Name -> value, as on the command line.
        erase_from_scale (`float`, *optional*): `negative_guidance_scale` with `erase_from`, if that is another.
    """

    source: str
    options: dict[str, Any]
    erase_from_scale: float | None = None

    @property
    def told(self) -> str:
        """The options in one line, without those that no preset changes."""
        return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in self.options.items())  # fmt: skip


_COMMON = {"train_method": "xattn", "num_inference_steps": 50, "prompt_order": "matched"}
_ADAM = {"adam_weight_decay": 0.0, "max_grad_norm": 0.0}

# eta is the paper's. The code of 2025 has `negative_guidance`, eta + 1 where nothing else is erased from, else eta.
# Its weights are bfloat16, in which most updates are lost; ours are float32.
ESD_PRESETS = {
    "paper": Preset(
        "Gandikota et al., arXiv 2303.07345, and its CompVis code of 2023",
        {"max_train_steps": 1000, "learning_rate": 1e-5, "negative_guidance_scale": 1.0, "sampling_model": "student",
         "sampling_guidance_scale": 3.0, **_ADAM, **_COMMON},
    ),
    "esd-2025": Preset(
        "github.com/rohitgandikota/erasing, 2025, Stable Diffusion 1.x",
        {"max_train_steps": 200, "learning_rate": 5e-5, "negative_guidance_scale": 1.0, "sampling_model": "frozen",
         "sampling_guidance_scale": 3.0, **_ADAM, **_COMMON},
        erase_from_scale=2.0,
    ),
    "esd-2025-xl": Preset(
        "the same, SDXL, esd-x",
        {"max_train_steps": 200, "learning_rate": 2e-4, "negative_guidance_scale": 0.0, "sampling_model": "frozen",
         "sampling_guidance_scale": 2.0, **_ADAM, **_COMMON},
        erase_from_scale=1.0,
    ),
    "safe-diffusion": Preset(
        "github.com/nannullna/safe-diffusion, train_esd.py",
        {"max_train_steps": 1000, "learning_rate": 1e-5, "negative_guidance_scale": 3.0, "sampling_model": "student",
         "sampling_guidance_scale": 3.0, "adam_weight_decay": 1e-4, "max_grad_norm": 1.0, **_COMMON},
    ),
}  # fmt: skip


def presets_table(presets: dict[str, Preset] = ESD_PRESETS) -> str:
    """A Markdown table, an option a row."""
    names = list(dict.fromkeys(name for preset in presets.values() for name in preset.options))
    rows = [f"| | {' | '.join(f'`{name}`' for name in presets)} |", "|---" * (len(presets) + 1) + "|"]
    for name in names:
        rows.append(f"| `{name}` | {' | '.join(f'{preset.options[name]}' for preset in presets.values())} |")
    scales = [preset.erase_from_scale or preset.options["negative_guidance_scale"] for preset in presets.values()]
    rows.append(f"| the same with `erase_from` | {' | '.join(map(str, scales))} |")
    return "\n".join(rows)
