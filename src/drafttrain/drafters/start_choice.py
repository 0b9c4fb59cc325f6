"""What a drafter's start leaves to be chosen on training texts, before the drafter is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from drafttrain.core.texts import Record
from drafttrain.target_model import Target


class StartChoice(ABC):
    """A choice that is made once a run, stored as JSON, and read by every later process of the run."""

    name: ClassVar[str]
    """What is chosen: in log lines."""

    @property
    @abstractmethod
    def num_texts(self) -> int:
        """Training texts that it reads: the first ones of the training's order."""

    @abstractmethod
    def choose(self, target: Target, records: Sequence[Record]) -> Mapping[str, Any]:
        """Return what was chosen, and the figures that it was chosen by.

        Raises:
            CheckpointError: The target has nothing to choose from.
        """

    @abstractmethod
    def settings(self, choice: Mapping[str, Any]) -> Any:
        """Return the drafter's settings with what was chosen."""
