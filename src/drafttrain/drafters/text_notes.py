"""What the target writes about every training text before the training, and how a step alters a text by it.

B = texts, T = tokens of a text, C = columns, N = rows, V = vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.altered_text import Alteration
from drafttrain.core.target_rows import TargetNeeds, TargetRows
from drafttrain.core.texts import Record
from drafttrain.target_model import Target

ROWS_AT_ONCE = 2048
"""Rows whose logits exist at once."""
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


@torch.no_grad()
def logits_of(records: Sequence[Record], target: Target) -> Iterator[Iterator[Tensor]]:
    """Yield for each text the target's logits of every token but the first, in parts logits_NV, float32.

    All texts are read in one call. The head runs as the parts are taken.
    """
    longest = max(len(record.tokens) for record in records)
    # Padding at the end of a row is read after all tokens of its text.
    tokens_BT = torch.tensor([[*one.tokens, *[0] * (longest - len(one.tokens))] for one in records])
    positions_BT = torch.arange(longest).expand(len(records), -1)
    rows = target.rows_of(target.read(tokens_BT, positions_BT, TargetNeeds(final=True)))
    for number, record in enumerate(records):
        index_N = torch.arange(len(record.tokens) - 1, device=target.device) + number * longest
        yield _in_parts(rows, index_N, num_tokens=target.num_tokens)


def _in_parts(rows: TargetRows, index_N: Tensor, *, num_tokens: int) -> Iterator[Tensor]:
    for part_N in index_N.split(ROWS_AT_ONCE):
        yield rows.at(part_N)[:, :num_tokens].float()
