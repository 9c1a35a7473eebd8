"""Student, EMA and frozen values of the selected weights of a denoiser; families say which are selected.

Cross-attention is 5 % of Stable Diffusion's denoiser, so the three models of an erasure share the other 95 %: there is
one denoiser in memory, and `TrainedWeights` swaps the values of the selected parameters in and out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..families import TRAIN_METHODS, TextEncoders, family_of_denoiser, resolve_train_method


__all__ = ["TRAIN_METHODS", "TrainedWeights", "check_plain", "resolve_train_method", "select_parameters"]


def select_parameters(module: nn.Module, train_method: str) -> list[str]:
    """As [`ModelFamily.select_parameters`], of the denoiser's family; of text encoders all parameters."""
    if isinstance(module, TextEncoders):
        return [name for name, _ in module.named_parameters()]
    return family_of_denoiser(module).select_parameters(module, train_method)


def check_plain(denoiser: nn.Module) -> None:
    """
    Raises:
        `ValueError`: If the denoiser has adapters.
    """
    if present := list(getattr(denoiser, "peft_config", {})):
        raise ValueError(f"the model has adapters already ({', '.join(present)}); fuse or unload them first")


class TrainedWeights:
    """Student, EMA and frozen values of the selected parameters around one resident denoiser.

    The denoiser's other parameters get `requires_grad=False`. The student is what the parameters hold outside `use`;
    the copies cost one times the selected parameters each.

    Args:
        denoiser (`nn.Module`): Its selected parameters are the student; fp32.
        names (`list[str]`): Result of [`select_parameters`].
        ema_decay (`float`, *optional*): `m` of `EMA = m * EMA + (1 - m) * student`, in [0, 1); no EMA if left out.
        keeps_frozen (`bool`, defaults to `True`): Whether `"frozen"` can be used.

    Raises:
        `ValueError`: If the decay is out of its range, or the denoiser has adapters.
    """

    def __init__(
        self, denoiser: nn.Module, names: list[str], ema_decay: float | None = None, keeps_frozen: bool = True
    ):
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay {ema_decay}: must be at least 0 and less than 1")
        check_plain(denoiser)
        denoiser.requires_grad_(False)
        self._set_up(denoiser, names)
        if not keeps_frozen:
            self.frozen = None
        self.ema_decay = ema_decay
        self.ema = None if ema_decay is None else self._copy()
        self._in_use = "student"

    def _set_up(self, denoiser: nn.Module, names: list[str]) -> None:
        """Sets `student`, what trains, and `frozen`, what it starts from in the base model."""
        parameters = dict(denoiser.named_parameters())
        self.student = {name: parameters[name].requires_grad_(True) for name in names}
        self.frozen = self._copy()

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.student.items()}

    def values(self, which: str) -> dict[str, torch.Tensor]:
        """The selected tensors of `"student"`, `"ema"` or `"frozen"`, by name; not copies."""
        values = {"student": self.student, "ema": self.ema, "frozen": self.frozen}
        if values.get(which) is None:
            raise ValueError(f"weights '{which}': there are only {', '.join(k for k, v in values.items() if v)}")
        return values[which]

    @contextmanager
    def use(self, which: str) -> Iterator[None]:
        """Makes the denoiser compute with these values inside the block; the student is back after it.

        It must be closed before the backward pass of a student's forward pass: autograd would see other weights.
        """
        self.values(which)  # an unknown name is reported before anything is swapped
        if which == self._in_use:
            yield
            return
        if self._in_use != "student":
            raise RuntimeError(f"weights '{self._in_use}' are in use; leave their block before using '{which}'")
        self._in_use = which
        try:
            with self._in_place_of_student(which):
                yield
        finally:
            self._in_use = "student"

    @contextmanager
    def _in_place_of_student(self, which: str) -> Iterator[None]:
        values = self.values(which)
        held = {name: parameter.data for name, parameter in self.student.items()}
        try:
            for name, parameter in self.student.items():
                parameter.data = values[name]
            torch.clear_autocast_cache()  # it knows parameters by identity, and their values have just changed
            yield
        finally:
            for name, parameter in self.student.items():
                parameter.data = held[name]
            torch.clear_autocast_cache()

    @torch.no_grad()
    def update_ema(self, most: float = 1.0) -> None:
        """One step of `EMA = m * EMA + (1 - m) * student` (SDD, algorithm 1), with m at `most` this. Without an EMA it
        does nothing."""
        if self.ema is not None:
            for name, average in self.ema.items():
                average.lerp_(self.student[name].detach(), 1 - min(self.ema_decay, most))

    @torch.no_grad()
    def start_from(self, values: dict[str, torch.Tensor]) -> None:
        """Gives the student and its average these values; `frozen` stays what it is.

        Raises:
            `ValueError`: If a name is not among the selected parameters.
        """
        if others := [name for name in values if name not in self.student]:
            raise ValueError(f"it changed {others[0]}, which the train method does not select")
        for name, value in values.items():
            for side in (self.student, self.ema or {}):
                if name in side:
                    side[name].copy_(value)

    @torch.no_grad()
    def undo(self) -> None:
        """Gives the denoiser its frozen values back, for good: what was trained is lost."""
        for name, parameter in self.student.items():
            parameter.copy_(self.frozen[name])

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Student and EMA, for checkpoints. The frozen values are the base model's own."""
        state = {"student": {name: value.detach() for name, value in self.student.items()}}
        return state if self.ema is None else {**state, "ema": self.ema}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        expected = self.state_dict()
        if state.keys() != expected.keys() or any(state[key].keys() != expected[key].keys() for key in expected):
            raise ValueError("checkpoint: it trains other weights, or has another EMA setting, than this run")
        for key, values in expected.items():
            for name, value in values.items():
                value.copy_(state[key][name])
