"""What the target writes about every training text before the training, and how a step alters a text by it.

T = tokens of a text, C = columns
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from drafttrain.core.altered_text import Alteration
from drafttrain.core.texts import Record
from drafttrain.target_model import Target

Notes = np.ndarray[tuple[int, int], np.dtype[np.int32]]


class TextNotes(ABC):
    """Integers beside every token of a text, made once from the target. Both functions are pure functions of their arguments."""

    name: ClassVar[str]
    """What is noted: in log lines, and the name of its folder."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Integers beside a token."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return the settings that the notes depend on."""

    @abstractmethod
    def of(self, records: Sequence[Record], target: Target, *, seed: int) -> list[Notes]:
        """Return notes_TC of each text."""

    @abstractmethod
    def altered(self, record: Record, notes_TC: Notes, *, seed: int) -> Alteration:
        """Return how a training step reads the text a second time.

        Args:
            seed: Of this text at this step.
        """

    @abstractmethod
    def summary(self, records: Sequence[Record], notes: Sequence[Notes]) -> str:
        """Return in one line what was found; `records` are those of `notes`.

        Raises:
            DataError: Nothing can be trained on these notes.
        """
