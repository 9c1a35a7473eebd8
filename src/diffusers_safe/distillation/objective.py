"""Block-removed knowledge distillation: Kim et al. (BK-SDM), ECCV 2024, arXiv 2305.15798."""

from typing import Any

import torch
from torch import nn

from ..methods.objective import squared_error
from ..values import choose


FEATURE_MAPS = ("bk", "bk+mid", "segmind")
Features = list[torch.Tensor]


def feature_pairs(student: dict[str, Any], teacher: dict[str, Any], feature_map: str) -> list[tuple[str, str]]:
    """Which module of a student learns to put out what which module of its teacher does.

    * `"bk"`, of the paper: the output of every down and up block, never of the mid block. A student without the
      deepest level (bk-tiny) has its up block i learn from the teacher's i + 1, and of its last down block, which
      lacks the downsampler, the output projection of the last attention.
    * `"bk+mid"`: that, and the mid block.
    * `"segmind"`, of distill-sd: the output of every block that the student has. Without the deepest level its last
      down block learns from the teacher's first up block.

    Args:
        student, teacher (`dict`): Configs of their denoisers.
        feature_map (`str`): One of `FEATURE_MAPS`.

    Returns:
        `list[tuple[str, str]]`: Names of modules, the student's and the teacher's.

    Raises:
        `ValueError`: If the map is unknown, or does not fit the two.
    """
    feature_map = choose("feature_map", feature_map, FEATURE_MAPS)
    widths, levels = tuple(student["block_out_channels"]), len(student["block_out_channels"])
    missing = len(teacher["block_out_channels"]) - levels
    if missing not in (0, 1) or widths != tuple(teacher["block_out_channels"])[:levels]:
        raise ValueError(
            f"feature_map '{feature_map}': the student's blocks have {list(widths)} channels, the teacher's "
            f"{list(teacher['block_out_channels'])}; they must be the same, or lack the teacher's deepest level"
        )
    has_mid = bool(student["mid_block_type"])
    if feature_map == "bk+mid" and not (has_mid and teacher["mid_block_type"] and not missing):
        raise ValueError("feature_map 'bk+mid': student and teacher must both have a mid block; take bk or segmind")
    down = [(f"down_blocks.{i}",) * 2 for i in range(levels - missing)]
    up = [(f"up_blocks.{i}", f"up_blocks.{i + missing}") for i in range(levels)]
    middle = []
    if missing and feature_map == "segmind":
        middle = [(f"down_blocks.{levels - 1}", "up_blocks.0")]
    elif missing:
        middle = [(_last_attention(student, levels - 1), _last_attention(teacher, levels - 1))]
    elif feature_map == "bk+mid" or (feature_map == "segmind" and has_mid):
        middle = [("mid_block", "mid_block")]
    return down + middle + up


def _last_attention(config: dict[str, Any], level: int) -> str:
    layers = config["layers_per_block"]
    count = layers if isinstance(layers, int) else layers[level]
    return f"down_blocks.{level}.attentions.{count - 1}.proj_out"


class FeatureTap:
    """Catches the outputs of modules during one forward pass.

        with tap: noise_pred = denoiser(...)
        features = tap.take()

    Only inside the block: the second forward pass of gradient checkpointing, in the backward pass, is not caught.

    Args:
        denoiser (`nn.Module`): Not wrapped.
        names (`list[str]`): Of its modules, each once.

    Raises:
        `ValueError`: If there is no such module.
    """

    def __init__(self, denoiser: nn.Module, names: list[str]):
        modules = dict(denoiser.named_modules())
        if lacking := [name for name in names if modules.get(name) is None]:
            raise ValueError(f"feature_map: this denoiser has no {', '.join(lacking)}")
        self.names, self._caught, self._listens = names, {}, False
        self._hooks = [
            modules[name].register_forward_hook(lambda module, inputs, output, name=name: self._catch(name, output))
            for name in names
        ]

    def _catch(self, name: str, output: torch.Tensor | tuple) -> None:
        if self._listens:
            self._caught[name] = output[0] if isinstance(output, tuple) else output

    def __enter__(self):
        self._caught, self._listens = {}, True

    def __exit__(self, *_):
        self._listens = False

    def take(self) -> Features:
        """The outputs, in the order of `names`; they are forgotten here."""
        caught, self._caught = self._caught, {}
        return [caught[name] for name in self.names]

    def remove(self) -> None:
        """Leaves the denoiser as it was."""
        for hook in self._hooks:
            hook.remove()


class DistillationObjective:
    """The three terms of the loss, each `(B,)`, unreduced:

        task     || target - eps_S ||^2
        output   || eps_T - eps_S ||^2
        feature  sum_k || f_T,k - f_S,k ||^2

    A term whose weight is 0 is not computed. Squared errors are means over all elements of a sample.

    Args:
        task_weight, output_weight, feature_weight (`float`): At least 0, one of them above. 1, 1, 1 in BK-SDM.
    """

    name = "distillation"

    def __init__(self, task_weight: float = 1.0, output_weight: float = 1.0, feature_weight: float = 1.0):
        weights = {"task": task_weight, "output": output_weight, "feature": feature_weight}
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"{name}_weight {value}: must be at least 0")
        self.weights = {name: value for name, value in weights.items() if value > 0}
        if not self.weights:
            raise ValueError("task_weight, output_weight, feature_weight: all are 0; nothing would be learned")
        if self.weights.keys() == {"feature"}:
            raise ValueError(
                f"feature_weight {feature_weight}: alone it does not train the last layers; task_weight or "
                "output_weight must be above 0"
            )

    @property
    def needs_teacher(self) -> bool:
        return self.weights.keys() != {"task"}

    def losses(
        self,
        student_pred: torch.Tensor,
        target: torch.Tensor,
        teacher_pred: torch.Tensor | None = None,
        student_features: Features = (),
        teacher_features: Features = (),
    ) -> dict[str, torch.Tensor]:
        """The terms that count, by name, `(B,)` each; predictions and target are `(B, C, H, W)`."""
        losses = {}
        if "task" in self.weights:
            losses["task"] = squared_error(student_pred, target)
        if "output" in self.weights:
            losses["output"] = squared_error(student_pred, teacher_pred)
        if "feature" in self.weights:
            pairs = zip(student_features, teacher_features, strict=True)
            losses["feature"] = sum(squared_error(own.float(), other.float()) for own, other in pairs)
        return losses
