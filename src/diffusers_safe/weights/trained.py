"""Which weights of a denoiser train, and student, EMA and frozen values of only those weights.

Cross-attention training touches 5 % of an SD UNet, so the three models of an erasure share the other 95 %: there is
one denoiser in memory, and `TrainedWeights` swaps the values of the selected parameters in and out.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..arguments import choose


@dataclass(frozen=True)
class TrainMethod:
    """A rule that selects parameters: `selects(name, module)` with the parameter's full name and its owner.

    `by_number`: it names blocks by their numbers in Stable Diffusion 1.x, which are other blocks in other UNets.
    """

    description: str
    selects: Callable[[str, nn.Module], bool]
    alias: str | None = None
    by_number: bool = False


def _is_time_or_output(name: str) -> bool:
    return name.startswith(("time_embedding.", "conv_out.", "conv_norm_out."))


def _inside(name: str, attention: str, blocks: tuple[str, ...]) -> bool:
    return f".{attention}." in name and name.startswith(blocks)


# Where SD 1.x and 2.x attend outside the middle: on three of four levels, one transformer block a place.
_SD_BLOCKS = {
    f"{side}_blocks.{level}.attentions.{place}.transformer_blocks.0"
    for side, levels, places in (("down", (0, 1, 2), 2), ("up", (1, 2, 3), 3))
    for level in levels
    for place in range(places)
}


def _numbered_as_sd(modules: dict[str, nn.Module]) -> bool:
    return _SD_BLOCKS == {name for name in modules if re.match(r"(down|up)_blocks.*\.transformer_blocks\.\d+$", name)}


TRAIN_METHODS: dict[str, TrainMethod] = {
    "xattn": TrainMethod("cross-attention", lambda name, _: "attn2" in name, "esd-x"),
    "xattn-strict": TrainMethod(
        "keys and values of cross-attention",
        lambda name, _: "attn2.to_k" in name or "attn2.to_v" in name,
        "esd-x-strict",
    ),
    "noxattn": TrainMethod(
        "all but cross-attention, the time embedding and the output convolution",
        lambda name, _: "attn2" not in name and not _is_time_or_output(name),
    ),
    "selfattn": TrainMethod("self-attention", lambda name, _: "attn1" in name),
    "full": TrainMethod("everything", lambda name, _: True, "esd-all"),
    "notime": TrainMethod(
        "all but the time embedding and the output convolution", lambda name, _: not _is_time_or_output(name)
    ),
    "esd-u": TrainMethod(
        "every linear and convolution layer outside cross-attention, no norms",
        lambda name, module: isinstance(module, (nn.Linear, nn.Conv2d)) and "attn2" not in name,
    ),
    "xlayer": TrainMethod(
        "cross-attention of up_blocks.2.attentions.0 and .2",
        lambda name, _: _inside(name, "attn2", ("up_blocks.2.attentions.0.", "up_blocks.2.attentions.2.")),
        by_number=True,
    ),
    "selflayer": TrainMethod(
        "self-attention of down_blocks.1.attentions.0 and down_blocks.2.attentions.0",
        lambda name, _: _inside(name, "attn1", ("down_blocks.1.attentions.0.", "down_blocks.2.attentions.0.")),
        by_number=True,
    ),
}
_ALIASES = {method.alias: name for name, method in TRAIN_METHODS.items() if method.alias}


def resolve_train_method(train_method: str) -> str:
    """The name in `TRAIN_METHODS` of a train method or of its alias.

    Raises:
        `ValueError`: If the name is unknown.
    """
    name = choose("train_method", train_method, [*TRAIN_METHODS, *_ALIASES])
    return _ALIASES.get(name, name)


def select_parameters(denoiser: nn.Module, train_method: str) -> list[str]:
    """The names of the parameters that a train method trains.

    The rules are those of ESD (arXiv 2303.07345, its repositories of 2023 and 2025) and SDD (arXiv 2307.05977).

    Args:
        denoiser (`nn.Module`): A `UNet2DConditionModel`.
        train_method (`str`): A name or alias of `TRAIN_METHODS`.

    Returns:
        `list[str]`: Names in the order of `denoiser.named_parameters()`; never empty.

    Raises:
        `ValueError`: If the name is unknown, selects nothing in this denoiser, or means blocks that are elsewhere in
            it.
    """
    method = TRAIN_METHODS[resolve_train_method(train_method)]
    modules = dict(denoiser.named_modules())
    if method.by_number and not _numbered_as_sd(modules):
        allowed = ", ".join(name for name, other in TRAIN_METHODS.items() if not other.by_number)
        raise ValueError(
            f"train_method '{train_method}' ({method.description}) means blocks of Stable Diffusion 1.x and 2.x, and "
            f"this model's are others; allowed are {allowed}"
        )
    names = [name for name, _ in denoiser.named_parameters() if method.selects(name, modules[name.rpartition(".")[0]])]
    if not names:
        raise ValueError(
            f"train_method '{train_method}' ({method.description}) selects no parameter of {type(denoiser).__name__}"
        )
    return names


def find_train_method(denoiser: nn.Module, names: Collection[str]) -> str | None:
    """The name of the train method that selects exactly these parameters, if one does."""
    modules = dict(denoiser.named_modules())
    for method_name, method in TRAIN_METHODS.items():
        if not method.by_number or _numbered_as_sd(modules):
            parameters = [name for name, _ in denoiser.named_parameters()]
            if {name for name in parameters if method.selects(name, modules[name.rpartition(".")[0]])} == set(names):
                return method_name
    return None


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

        It must be closed before the backward of a student's forward: autograd would see other weights.
        """
        self.values(which)  # an unknown name is told before anything is swapped
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
