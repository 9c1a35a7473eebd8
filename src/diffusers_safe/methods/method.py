"""What an erasure method is, and the registry of all of them.

A method is one file in this folder: a dataclass whose fields are the method's own options, with a description, and one
verb, [`~Method.erase`], under the decorator [`register_method`]. Other packages name theirs in the entry point group
`diffusers_safe.methods`. The command line, `erase(method=...)`, the plan, model cards, the lists in the docs and the
shared tests read the registry.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..arguments import option
from ..families import ModelFamily
from ..values import choose
from .objective import Objective


ENTRY_POINTS = "diffusers_safe.methods"
DEFAULT_METHOD = "text_edit"


class Run(Protocol):
    """What a method works with.

    Attributes:
        family (`ModelFamily`): The model: encodes prompts, predicts, and holds the denoiser.
        concepts (`list[str]`): What is to be erased.
        retained (`list[str]`): Prompts whose predictions should stay.
        erased_before (`list[str]`): Concepts that the record of the base model names.
    """

    family: ModelFamily
    concepts: list[str]
    retained: list[str]
    erased_before: list[str]

    def train(self, objective: Objective) -> None:
        """Trains the selected weights until the run's last step: latents, loss, optimizer, EMA, log, checkpoints."""

    def edit(self, values: Mapping[str, torch.Tensor], anchors: list[str] | None = None) -> None:
        """Gives parameters of the denoiser, by name, new values of the same shapes.

        Args:
            values (`Mapping[str, torch.Tensor]`): By name.
            anchors (`list[str]`, *optional*): What each concept becomes, for the measurement and the record.
        """


class Method(ABC):
    """An erasure method; its instances hold the method's options.

    Attributes:
        name (`str`): In commands and in `erasure.json`.
        title, authors (`str`): Of the publication.
        paper (`str`): Its arXiv number; empty if there is none.
        summary (`str`): One line.
        trains (`bool`): Whether it trains with an optimizer, which adds the options of a training.
        defaults (`dict[str, Any]`): Defaults of other options that differ from the usual ones.
        presets (`dict[str, Preset]`): Published settings; the method then has an option `preset`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    authors: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    trains: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {}
    presets: ClassVar[dict[str, "Preset"]] = {}
    ema_decay: float | None = None

    @classmethod
    def preset_values(cls) -> dict[str, dict[str, Any]]:
        """The values that each preset gives to options."""
        return {name: preset.options for name, preset in cls.presets.items()}

    @classmethod
    def get_source(cls) -> str:
        """Authors and number of the publication."""
        return f"{cls.authors}, arXiv {cls.paper}" if cls.paper else cls.authors

    def check(self, options: Any) -> None:  # noqa: B027, most have nothing to check
        """Checks the method's options against the others of a run, `ErasureOptions`.

        Raises:
            `ValueError`: If they contradict each other.
        """

    def edited(self, denoiser: nn.Module) -> list[str]:
        """The parameters that a method without training will give new values, as far as it knows them before; the
        denoiser may be on the meta device.

        Raises:
            `ValueError`: If the method cannot erase from it.
        """
        return []

    def prompts(self, concepts: list[str]) -> list[str]:
        """The prompts that it encodes besides the concepts and the retained ones."""
        return []

    @abstractmethod
    def erase(self, run: Run) -> None:
        """Erases the concepts of a run from its model."""


class GradientMethod(Method):
    """A method that is a loss of the denoiser's predictions."""

    trains = True

    @abstractmethod
    def objective(self, concepts: list[str]) -> Objective:
        """What is minimised."""

    def prompts(self, concepts: list[str]) -> list[str]:
        return list(self.objective(concepts).prompts)

    def erase(self, run: Run) -> None:
        run.train(self.objective(run.concepts))


@dataclass(frozen=True)
class Preset:
    """The settings of one publication.

    Attributes:
        source (`str`): Where they are published.
        options (`dict`): Values by name, as on the command line.
    """

    source: str
    options: dict[str, Any]


def preset_option(default: str, presets: Mapping[str, Preset], **facts: Any) -> Any:
    """Declares the option `preset` of a method."""
    names = "; ".join(f"{name} ({preset.source})" for name, preset in presets.items())
    text = f"Published settings, used for all options that are not given (values in docs/methods.md): {names}."
    return option(default, text, presets, essential=True, **facts)


_registered: dict[str, type[Method]] = {}


def register_method(method: type[Method]) -> type[Method]:
    """Class decorator: makes a method known by its name.

    Raises:
        `ValueError`: If another method has that name, or an option's name is taken.
        `TypeError`: If the class is no dataclass itself.
    """
    if not is_dataclass(method) or "__dataclass_fields__" not in vars(method):
        raise TypeError(f"method '{method.name}': decorate {method.__name__} with @dataclass(kw_only=True), too")
    own = {item.name for item in fields(method)} - {"ema_decay"}
    if taken := sorted(name for name in own if hasattr(Method, name) or name in ("config", "help", "version")):
        raise ValueError(f"method '{method.name}': its options cannot be named {', '.join(taken)}")
    known = _registered.setdefault(method.name, method)
    if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(f"method '{method.name}': is registered already, by {known.__module__}")
    _registered[method.name] = method
    return method


class _Methods(Mapping[str, type[Method]]):
    """All methods by name: those of this package and of entry points are imported at the first look."""

    _loaded = False

    def _all(self) -> dict[str, type[Method]]:
        if not self._loaded:
            type(self)._loaded = True
            for module in iter_modules([str(Path(__file__).parent)]):
                import_module(f"{__package__}.{module.name}")
            for entry in entry_points(group=ENTRY_POINTS):
                register_method(entry.load())
        return _registered

    def __getitem__(self, name: str) -> type[Method]:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __len__(self) -> int:
        return len(self._all())


METHODS: Mapping[str, type[Method]] = _Methods()


def method_label(name: str) -> str:
    """The name of a method in texts, such as `ESD` or `text edit`."""
    return name.replace("_", " ") if "_" in name else name.upper()


def find_method(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        `ValueError`: If there is none.
    """
    return METHODS[choose("method", name, METHODS)]
