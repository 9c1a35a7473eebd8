"""The names of the train methods: selections of a denoiser's parameters, or the text encoders. Families have the
rules.

A name means the same in every model family; which parameters that are, each family says itself
([`ModelFamily.train_methods`]). The rules are those of ESD (arXiv 2303.07345, its repositories of 2023 and 2025) and
SDD (arXiv 2307.05977).
"""

from dataclasses import dataclass

from ..values import choose


@dataclass(frozen=True)
class TrainMethod:
    """Attributes:
    description (`str`): What is trained.
    alias (`str`, *optional*): The name that ESD's scripts have for it.
    """

    description: str
    alias: str | None = None

    @property
    def described(self) -> str:
        """The description, with the alias."""
        return f"{self.description}; also named {self.alias}" if self.alias else self.description


TEXT_ENCODERS = "text-encoders"
TRAIN_METHODS: dict[str, TrainMethod] = {
    "xattn": TrainMethod("cross-attention", "esd-x"),
    "xattn-strict": TrainMethod("keys and values of cross-attention", "esd-x-strict"),
    "noxattn": TrainMethod("all but cross-attention, the time embedding and the output convolution"),
    "selfattn": TrainMethod("self-attention"),
    "full": TrainMethod("everything", "esd-all"),
    "notime": TrainMethod("all but the time embedding and the output convolution"),
    "esd-u": TrainMethod("every linear and convolution layer outside cross-attention, no norms"),
    "xlayer": TrainMethod("cross-attention of up_blocks.2.attentions.0 and .2"),
    "selflayer": TrainMethod("self-attention of down_blocks.1.attentions.0 and down_blocks.2.attentions.0"),
    TEXT_ENCODERS: TrainMethod("the text encoders instead of the denoiser"),
}
_ALIASES = {method.alias: name for name, method in TRAIN_METHODS.items() if method.alias}


def resolve_train_method(train_method: str) -> str:
    """The name in `TRAIN_METHODS` of a train method or of its alias.

    Raises:
        `ValueError`: If the name is unknown.
    """
    name = choose("train_method", train_method, [*TRAIN_METHODS, *_ALIASES])
    return _ALIASES.get(name, name)
