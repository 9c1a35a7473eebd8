"""What a training continues from a checkpoint."""

from abc import ABC, abstractmethod


class Resumable(ABC):
    """A part of a training that goes on over steps; its state is part of every checkpoint."""

    @abstractmethod
    def prepare(self) -> None:
        """Prepares the first step. Called once, after a state was loaded."""

    @abstractmethod
    def state_dict(self) -> dict:
        """The state that a resumed run cannot compute again. Called on every process."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Continues from a `state_dict`."""
