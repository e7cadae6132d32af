"""A model over its devices: what of it is in this process, and the processes that hold the rest."""

from dataclasses import dataclass
from typing import Any

from ..engine.runner import Runner
from ..models.internvl import InternVLModel


@dataclass
class Halves:
    """What one engine runs. model: the part of it in this process."""

    model: InternVLModel

    def runner(self, **limits: Any) -> Runner:
        """A runner of all of it; limits: the keywords of `Runner`."""
        return Runner(self.model, **limits)

    def close(self) -> None:
        """End the processes."""
