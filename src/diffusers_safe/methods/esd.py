"""ESD: Erasing Concepts from Diffusion Models, Gandikota et al., ICCV 2023, arXiv 2303.07345."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..arguments import option
from ..concepts import is_visible
from ..values import choose, plain_word
from .method import GradientMethod, Preset, preset_option, register_method
from .objective import Objective, TrainingBatch, squared_error, targets
from .predictor import Predictor


ESD_SAMPLERS = ("student", "frozen")


class ESDObjective(Objective):
    """The student's prediction for the concept moves to the opposite of the base model's.

    With the student eps, the base model eps*, a concept c, and eta:

        || eps(z_t, c) - (eps*(z_t, "") - eta * (eps*(z_t, c) - eps*(z_t, ""))) ||^2

    With `erase_from` f, the concept is erased from what that prompt says, and other prompts stay ("Van Gogh" from "a
    painting"); the trajectories are then guided by f, too. The rule is that of the authors' code of 2025:

        || eps(z_t, f) - (eps*(z_t, f) - eta * (eps*(z_t, c) - eps*(z_t, ""))) ||^2

    Args:
        negative_guidance_scale (`float`, defaults to 1.0): eta, at least 0, as in the paper. (In the code of 2025 f is
            c by default, and its `negative_guidance` is then eta + 1.)
        erase_from (`str`, *optional*): f; the paper's rule without it.
        trajectory_weights (`str`, defaults to `"student"`): Whose weights sample the latents: the student's (the
            paper) or the frozen base model's (the code of 2025).

    Raises:
        `ValueError`: If the scale is below 0 or the weights unknown.
    """

    name = "esd"
    output_weights = "student"

    def __init__(
        self,
        negative_guidance_scale: float = 1.0,
        erase_from: str | None = None,
        trajectory_weights: str = "student",
    ):
        if not negative_guidance_scale >= 0:
            raise ValueError(f"negative_guidance_scale {negative_guidance_scale}: must be at least 0")
        self.trajectory_weights = choose("trajectory_weights", trajectory_weights, ESD_SAMPLERS)
        self.negative_guidance_scale, self.erase_from = negative_guidance_scale, erase_from
        self.prompts = () if erase_from is None else (erase_from,)
        self.trajectory_prompt = erase_from

    def loss(self, predictor: Predictor, batch: TrainingBatch) -> torch.Tensor:
        count = len(batch.prompts)
        trained = batch.prompts if self.erase_from is None else [self.erase_from] * count
        target = self._target(predictor, batch, trained if self.erase_from is not None else [""] * count)
        return squared_error(predictor(batch.model_input, batch.timesteps, trained, "student"), target)

    def _target(self, predictor: Predictor, batch: TrainingBatch, base: list[str]) -> torch.Tensor:
        if not self.negative_guidance_scale:
            return targets(predictor, batch, [base], "frozen")[0]
        nothing = [""] * len(batch.prompts)
        start, concept, empty = targets(predictor, batch, [base, batch.prompts, nothing], "frozen")
        return start - self.negative_guidance_scale * (concept - empty)  # equation 7


_COMMON = {"train_method": "xattn", "num_inference_steps": 50, "prompt_order": "matched"}
_ADAM = {"adam_weight_decay": 0.0, "max_grad_norm": 0.0}

# eta is the paper's. In the code of 2025 `negative_guidance` is eta + 1 without `erase_from`, and eta with it. Its
# weights are bfloat16, in which most updates are lost; ours are float32.
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
    ),
    "esd-2025-xl": Preset(
        "github.com/rohitgandikota/erasing, 2025, SDXL, esd-x",
        {"max_train_steps": 200, "learning_rate": 2e-4, "negative_guidance_scale": 0.0, "sampling_model": "frozen",
         "sampling_guidance_scale": 2.0, **_ADAM, **_COMMON},
    ),
    "safe-diffusion": Preset(
        "github.com/nannullna/safe-diffusion, train_esd.py",
        {"max_train_steps": 1000, "learning_rate": 1e-5, "negative_guidance_scale": 3.0, "sampling_model": "student",
         "sampling_guidance_scale": 3.0, "adam_weight_decay": 1e-4, "max_grad_norm": 1.0, **_COMMON},
    ),
}  # fmt: skip
_PAPER = ESD_PRESETS["paper"].options
ERASE_FROM_SCALES = {"esd-2025": 2.0, "esd-2025-xl": 1.0}  # eta of presets that have another with `erase_from`


@register_method
@dataclass(kw_only=True)
class ESD(GradientMethod):
    """The options of ESD."""

    name = "esd"
    title = "Erasing Concepts from Diffusion Models"
    authors = "Gandikota et al., ICCV 2023"
    paper = "2303.07345"
    summary = "The prediction for a concept moves to the opposite of what the base model predicts for it."
    defaults: ClassVar[dict[str, Any]] = {
        name: _PAPER[name] for name in ("prompt_order", "max_train_steps", "adam_weight_decay", "max_grad_norm")
    }
    presets: ClassVar[dict[str, Preset]] = ESD_PRESETS

    preset: str = preset_option("paper", ESD_PRESETS, may_change=True)
    negative_guidance_scale: float | None = option(
        None,
        "eta of the paper: how far beyond the unconditional prediction the concept is moved. negative_guidance of the "
        "authors' code of 2025 is eta + 1 without --erase_from, and eta with it. Default: that of --preset; with "
        f"--erase_from {', '.join(f'{scale:g} for {name}' for name, scale in ERASE_FROM_SCALES.items())}.",
        at_least=0,
        essential=True,
    )
    erase_from: str | None = option(
        None,
        "Erase the concepts only from what this prompt generates, such as 'a painting'. Other prompts do not change.",
        essential=True,
    )
    sampling_model: str = option(
        _PAPER["sampling_model"],
        "Model that samples the latents: student (the one that trains, as in the paper) or frozen (the base model).",
        ESD_SAMPLERS,
    )

    def __post_init__(self):
        if self.erase_from is not None and not is_visible(self.erase_from):
            raise ValueError("erase_from: is blank; leave it out, or name a prompt")
        if self.negative_guidance_scale is None:
            scale = self.presets[self.preset].options["negative_guidance_scale"]
            if self.erase_from is not None:
                scale = ERASE_FROM_SCALES.get(self.preset, scale)
            self.negative_guidance_scale = scale

    @classmethod
    def preset_values(cls) -> dict[str, dict[str, Any]]:
        """Without the scale, which also depends on `erase_from`."""
        return {
            name: {key: value for key, value in values.items() if key != "negative_guidance_scale"}
            for name, values in super().preset_values().items()
        }

    def check(self, options: Any) -> None:
        retention, train_method = options.retention, options.weights.train_method
        if self.erase_from is not None and plain_word(self.erase_from) in map(plain_word, retention.retain_prompts):
            raise ValueError(f"retain_prompts '{self.erase_from}': is what the concepts are erased from")
        retention.watch_prompts = [prompt for prompt in retention.watch_prompts if prompt != self.erase_from]
        learning_rate = options.optimizer.learning_rate
        if self.preset == "esd-2025-xl" and not train_method.startswith("xattn") and learning_rate == 2e-4:
            raise ValueError(
                "learning_rate 0.0002: preset esd-2025-xl has it for esd-x only; with train_method "
                f"{train_method} the code of 2025 takes 1e-5: give --learning_rate"
            )

    def objective(self, concepts: list[str]) -> ESDObjective:
        return ESDObjective(self.negative_guidance_scale, self.erase_from, self.sampling_model)


def presets_table() -> str:
    """The presets as a Markdown table, an option per row."""
    names = list(dict.fromkeys(name for preset in ESD_PRESETS.values() for name in preset.options))
    rows = [f"| | {' | '.join(f'`{name}`' for name in ESD_PRESETS)} |", "|---" * (len(ESD_PRESETS) + 1) + "|"]
    for name in names:
        rows.append(f"| `{name}` | {' | '.join(f'{preset.options[name]}' for preset in ESD_PRESETS.values())} |")
    scales = {name: preset.options["negative_guidance_scale"] for name, preset in ESD_PRESETS.items()}
    values = " | ".join(map(str, {**scales, **ERASE_FROM_SCALES}.values()))
    rows.append(f"| `negative_guidance_scale` with `erase_from` | {values} |")
    return "\n".join(rows)
